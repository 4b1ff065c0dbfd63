"""Questions in a chat template: what is asked is what the template writes for the conversation."""

import copy

import pytest
import torch

from saap.eval import reference
from saap.eval.run import EvalConfig, run
from saap.eval.scores import score_run
from saap.eval.tasks.answering import ask_in_turn, encode
from saap.eval.tasks.base import Prompt
from saap.eval.tasks.chat import ChatTemplate
from saap.eval.tasks.passkey import IN_CHAT, IN_CODE, IN_WORDS, wording_of

pytestmark = pytest.mark.many_steps

CHAT = (
    "[be kind]{% for m in messages %}[{{ m.role }}]{{ m.content }}[end]{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture
def tokenizer(reference_tokenizer):
    own = copy.deepcopy(reference_tokenizer)
    own.chat_template = CHAT
    return own


def test_a_prompt_is_what_the_template_writes(tokenizer):
    template = ChatTemplate.of(tokenizer)
    plain = Prompt(b"a text\n", (b"first?", b"second?"), (("1",), ("2",)), 0.5)
    prompt = template.around(plain)
    first, second = (q.decode() for q in prompt.questions)
    turns = [
        {"role": "user", "content": "a text\nfirst?"},
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": "second?"},
    ]
    written = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    assert prompt.context.decode() + first + "one" + second == written
    assert (prompt.answers, prompt.depth) == (plain.answers, plain.depth)


def test_what_the_tokenizer_adds_is_not_written_twice(tokenizer):
    class Adding:
        chat_template, bos_token = CHAT, "[be kind]"
        apply_chat_template = tokenizer.apply_chat_template

        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": [0] * add_special_tokens + [1]}

    assert ChatTemplate.of(Adding()).opening == "[user]"
    assert ChatTemplate.of(tokenizer).opening == "[be kind][user]"


class Talker:
    """A decoder that says what it is told to, and keeps what it was given."""

    def __init__(self, answers):
        self.answers, self.given = answers, []

    def greedy(self, tokens, n_tokens, stop):
        self.given.append(tokens.tolist())
        return self.answers[len(self.given) - 1]


def test_an_answer_that_ends_early_is_not_ended_twice(tokenizer):
    stop = ChatTemplate.of(tokenizer).end_of_turn(tokenizer)
    assert stop == int(encode(tokenizer, b"[", special=False)[0])
    decoder = Talker([[65, 66, stop], [67, 68], [69]])
    questions = [torch.tensor([n]) for n in (1, 2, 3)]
    ask_in_turn(tokenizer, decoder, questions, 2, stop)
    # After an end the question follows; after the last token of a longer answer that token, which
    # is not in the cache.
    assert decoder.given == [[1], [2], [68, 3]]


def test_decoding_stops(reference_model, reference_tokenizer):
    from saap import hf
    from saap.budget import Budget
    from saap.eval.decoding import decoder
    from saap.methods import find_method

    read = hf.read_context(reference_model, encode(reference_tokenizer, b"def f(x):\n" * 20))
    with decoder(reference_model, read, find_method("dense")(), Budget(max_tokens=0), 64) as own:
        question = encode(reference_tokenizer, b"def", special=False)
        free = own.greedy(question, 6)
        own.restart(Budget(max_tokens=0))
        assert own.greedy(question, 6, stop=free[2]) == free[: free.index(free[2]) + 1]


@pytest.mark.parametrize("template", [None, "", "[hi]", "{{ messages[0].content }}"])
def test_a_template_that_cannot_be_used(tokenizer, template):
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=r"chat needs a (model|template) .*; got"):
        ChatTemplate.of(tokenizer)


def config(**options):
    return EvalConfig(
        methods=("dense", "saap"), contexts=(900,), answer_budgets=(0.3,), n_prompts=1,
        n_distractors=2, tasks=("passkey", "multi-query"), **options,
    )  # fmt: skip


def test_a_run(reference_model, tokenizer, tmp_path):
    text = reference.split_held_out()[1]
    run(reference_model, tokenizer, None, text, config(chat=True), tmp_path, model_name="tiny")
    scores = score_run(tmp_path)
    assert {(s["task"], s["method"]) for s in scores} == {
        (t, m) for t in ("passkey", "multi-query") for m in ("dense", "saap")
    }


def test_nothing_is_written_without_a_template(reference_model, reference_tokenizer, tmp_path):
    with pytest.raises(ValueError, match="chat needs a model with a chat template; got one"):
        run(
            reference_model, reference_tokenizer, None, b"x" * 5000, config(chat=True), tmp_path,
            model_name="tiny",
        )  # fmt: skip
    assert not list(tmp_path.iterdir())


def test_wordings(reference_tokenizer):
    assert wording_of(reference_tokenizer) is wording_of(reference_tokenizer, True) is IN_CODE
    words = [None] * 40_000
    assert wording_of(words) is IN_WORDS
    assert wording_of(words, chat=True) is IN_CHAT
