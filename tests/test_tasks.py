"""Tasks: prompts of the right length that hold their answers; every task runs and is scored."""

import dataclasses

import numpy as np
import pytest
import torch

from saap import hf
from saap.eval import reference
from saap.eval.decoding import each_point
from saap.eval.report.tables import answer_rows
from saap.eval.run import EvalConfig, run
from saap.eval.scores import score_run
from saap.eval.tasks.answering import evaluate
from saap.eval.tasks.copying import Copying
from saap.eval.tasks.needles import MultiKey, MultiQuery, MultiValue
from saap.eval.tasks.passkey import make_prompts
from saap.eval.tasks.prompts import Prompt, share_found
from saap.eval.tasks.registry import TASKS, find_task
from saap.eval.tasks.tracking import VariableTracking
from saap.eval.tasks.words import CommonWords, FrequentWords
from saap.eval.variants import make_variants

from .torch_threads import torch_threads

pytestmark = pytest.mark.many_steps

TEXT = reference.split_held_out()[1]
HIDDEN = [MultiKey, MultiValue, MultiQuery, VariableTracking, Copying]
PROMPTED = [*HIDDEN, CommonWords, FrequentWords]


ONE_METHOD = EvalConfig(methods=("dense",), contexts=(2048,))


def make_all(task, n_bytes, seed=0, depth=0.5, n_questions=1):
    return task().make(TEXT, n_bytes, np.random.default_rng(seed), depth, n_questions)


def make(task, n_bytes, seed=0, depth=0.5):
    (prompt,) = make_all(task, n_bytes, seed, depth)
    return prompt


@pytest.mark.parametrize("task", PROMPTED)
@pytest.mark.parametrize("n_bytes", [1500, 6001])
def test_prompts_have_their_length_and_hold_their_answers(task, n_bytes):
    prompt = make(task, n_bytes)
    assert 0.8 * n_bytes <= len(prompt.text) <= n_bytes
    for wanted in prompt.answers:
        for answer in wanted:
            assert answer.encode() in prompt.context
    assert len(prompt.questions) == len(prompt.answers)
    assert make(task, n_bytes).text == prompt.text
    assert make(task, n_bytes, seed=1).text != prompt.text


@pytest.mark.parametrize("task", [MultiKey, MultiValue, MultiQuery, Copying])
@pytest.mark.parametrize("depth", [0.0, 0.5, 0.9])
def test_the_first_answer_stands_at_its_depth(task, depth):
    prompt = make(task, 8000, depth=depth)
    place = prompt.context.index(prompt.answers[0][0].encode()) / len(prompt.context)
    assert abs(place - depth) < 0.15


def test_chains_are_in_order_and_complete():
    prompt = make(VariableTracking, 4000)
    text = prompt.context.decode()
    value = prompt.questions[0].split(b"value ")[1].split(b",")[0].decode()
    held = {value}
    for line in text.splitlines():
        if line.startswith("VAR "):
            name, source = line[4:].split(" = ")
            if source in held:
                held.add(name)
    assert held == {value, *prompt.answers[0]}


@pytest.mark.parametrize("task", [CommonWords, FrequentWords])
def test_the_asked_words_are_the_most_frequent(task):
    prompt = make(task, 6000)
    words = [w for w in prompt.context.decode().split()[:-1] if not w.endswith(".")]
    counts = {w: words.count(w) for w in set(words)}
    least = min(counts[w] for w in prompt.answers[0])
    assert all(n <= least for w, n in counts.items() if w not in prompt.answers[0])


def test_scores():
    prompt = Prompt(b"", (b"?", b"?"), (("one", "TWO"), ("three",)), 0.0)
    assert share_found(prompt, [b"two, four", b"three\n"]) == pytest.approx(2 / 3)
    copied = make(Copying, 2000)
    right = copied.answers[0][0].encode()
    assert Copying().score(copied, [right]) == 1.0
    assert Copying().score(copied, [right[:12] + b"_" + right[13:]]) == 0.5
    assert Copying().score(copied, [b""]) == 0.0


def test_too_short_a_text():
    with pytest.raises(
        ValueError, match=r"bytes of prompt with 12 lines .* must leave 1 to 9 bytes of"
    ):
        MultiQuery().make(b"too short", 5000, np.random.default_rng(0), 0.5)


def test_further_questions_are_about_the_same_context():
    one, three = (make_all(MultiKey, 5000, n_questions=n) for n in (1, 3))
    assert len(three) == 3
    assert len({p.context for p in three}) == 1
    assert len({p.questions for p in three}) == 3
    assert (three[0].questions, three[0].answers) == (one[0].questions, one[0].answers)
    for prompt in three:
        asked = prompt.questions[0].decode() + prompt.answers[0][0]
        assert prompt.context.decode().count(asked) == 1
        place = prompt.context.decode().index(asked) / len(prompt.context)
        assert abs(place - prompt.depth) < 0.15


def test_each_question_is_asked_as_if_it_were_the_only_one(reference_model, reference_tokenizer):
    rng = np.random.default_rng(3)
    prompts = make_prompts(TEXT, 1500, rng, n_distractors=3, n_questions=3)
    (variant,) = make_variants(("saap",), None, 0)
    points = [(variant, variant.points((0.2,), len(prompts[0].context), "group"))]

    def answers(prompts):
        records = evaluate(
            reference_model, reference_tokenizer, prompts, lambda *_: True, points, 8
        )
        return [r["generated"] for r in records]

    together = answers(prompts)
    assert len(set(together)) == 3  # three names, three keys
    assert together == [answers([p])[0] for p in prompts]


@pytest.mark.parametrize("n_questions", [0, 10])
def test_no_more_questions_than_keys(n_questions):
    with pytest.raises(ValueError, match=rf"n_questions must be at .*; got {n_questions}"):
        dataclasses.replace(ONE_METHOD, n_questions=n_questions)


def test_unknown_task_names_the_nearest():
    with pytest.raises(ValueError, match=r"got 'multikey' .did you mean 'multi-key'"):
        find_task("multikey")


@pytest.fixture(scope="module")
def scores(reference_model, reference_tokenizer, tmp_path_factory):
    config = EvalConfig(
        methods=("dense", "streaming", {"name": "quest", "search": {"share": ["group", "head"]}}),
        contexts=(900,), budgets=(0.3,), answer_budgets=(0.3,), n_texts=1, n_queries=4,
        n_prompts=1, n_questions=2, n_distractors=2, n_scored=16,
        tasks=tuple(t for t in TASKS if t not in ("multi-value", "variable-tracking", "geometry")),
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("tasks")
    with torch_threads(1):  # steps this small only wait for each other on a busy machine
        run(reference_model, reference_tokenizer, None, TEXT, config, folder, model_name="tiny")
    return score_run(folder)


def test_every_task_is_scored(scores):
    for task in {s["task"] for s in scores}:
        own = [(s["method"], s["budget"]) for s in scores if s["task"] == task]
        assert own == [
            ("dense", "0.3"), ("streaming", "0.3"), ("quest", "0.3 share=group"),
            ("quest", "0.3 share=head"),
        ], task  # fmt: skip
    answers = [s for s in scores if s.get("accuracy") is not None]
    assert len(answers) == 4 * 6
    assert all(0 <= s["accuracy"] <= 1 for s in answers)
    several = {s["task"]: s["questions"] for s in answers if s["questions"] > s["prompts"]}
    assert several == {"passkey": 2, "multi-key": 2}
    assert all("to_dense" in s for s in answers if s["method"] != "dense")


def test_perplexity_is_that_of_the_model(scores, reference_model, reference_tokenizer):
    from saap.eval.tasks.base import text_tokens

    tokens = text_tokens(reference_tokenizer, TEXT, 900, 0, 1)
    with torch.no_grad():
        logits = reference_model(tokens[None]).logits[0, -16:-1]
    true = float(torch.nn.functional.cross_entropy(logits, tokens[-15:]))
    own = {s["method"]: s["nll"] for s in scores if s["task"] == "perplexity"}
    assert own["dense"] == pytest.approx(true, rel=1e-4)
    assert own["streaming"] != own["dense"]


def test_distributions_are_held_against_those_of_dense_attention(scores):
    own = {s["method"]: s["divergence"] for s in scores if s["task"] == "perplexity"}
    assert own["dense"] == 0.0
    assert own["streaming"] > 1e-3
    rows = {(row[0], row[1]): row for row in answer_rows(scores)[900]}
    assert rows["streaming", "perplexity"][4] == f"{own['streaming']:.4f}"
    assert rows["streaming", "passkey"][4] == "–"


def test_dense_attention_is_measured_first_and_once(tiny_model, tiny_tokens):
    variants = make_variants(("streaming", "dense"), None, 0)
    asked = [(v, v.points((0.3, 0.5), 300, "group")) for v in variants]
    read = hf.read_context(tiny_model, tiny_tokens[0])
    order = []

    def measure(variant, point, decoder):
        order.append((variant.label, point.label))
        return [{"visited": decoder.logits([5]).shape[0]}]

    found = each_point(tiny_model, read, asked, 2, measure)
    assert order == [("dense", "0.3"), ("streaming", "0.3"), ("streaming", "0.5")]
    assert [(r["method"], r["budget"]) for r in found] == [
        ("streaming", "0.3"), ("streaming", "0.5"), ("dense", "0.3"), ("dense", "0.5"),
    ]  # fmt: skip


def test_without_dense_attention_there_is_no_distance_from_it(
    tmp_path, reference_model, reference_tokenizer
):
    config = EvalConfig(
        methods=("streaming",), contexts=(600,), tasks=("perplexity",), n_texts=1, n_scored=4,
        answer_budgets=(0.3,),
    )  # fmt: skip
    run(reference_model, reference_tokenizer, None, TEXT, config, tmp_path, model_name="tiny")
    (score,) = score_run(tmp_path)
    assert score["nll"] > 0
    assert "divergence" not in score


def test_drafting_counts_tokens_per_verification(scores):
    own = {s["method"]: s for s in scores if s["task"] == "drafting"}
    # 16 tokens: 9 of a full round, then 6 drafts and the verification's own.
    assert own["dense"]["accepted_per_verification"] == 8.0
    assert own["dense"]["selectivity"] == 1.0
    assert 1 <= own["streaming"]["accepted_per_verification"] <= 8.0
    assert own["streaming"]["selectivity"] < 0.4
    value, *_ = own["streaming"]["to_dense"]
    assert value == pytest.approx(own["streaming"]["accepted_per_verification"] - 8.0)
    rows = {(row[0], row[1]): row for row in answer_rows(scores)[900]}
    assert rows["dense", "drafting"][2] == "8.00 tokens"
    assert rows["streaming", "drafting"][3].startswith(f"{value:+.2f}")


def test_drafting_counts_as_lossless_decoding_does(reference_model, reference_tokenizer):
    from saap import hf
    from saap.budget import Budget
    from saap.eval.decoding import decoder
    from saap.eval.tasks.base import text_tokens
    from saap.eval.tasks.drafting import DRAFTS, drafted
    from saap.methods import find_method

    tokens = text_tokens(reference_tokenizer, TEXT, 600, 0, 1)
    read = hf.read_context(reference_model, tokens[:-1])
    budget = Budget(max_tokens=0, n_sink=4, window=16, flush_every=1)
    verify = hf.Verify(DRAFTS, adapt=False)
    options = {"max_new_tokens": 32, "do_sample": False, "eos_token_id": None}
    with hf.attached(reference_model, method="streaming", budget=budget, verify=verify) as own:
        cache = hf.cache_from(own, read, 700)
        found = reference_model.generate(tokens[None], **hf.over(cache), **options)
    read = hf.read_context(reference_model, tokens)
    with decoder(reference_model, read, find_method("streaming")(), budget, 64) as own:
        counted = drafted(own, int(found[0, 600]), found[0, 601:].tolist())
    tally = cache.pace.tally
    assert 0 < tally.accepted < tally.drafted
    assert counted == (tally.verifications, tally.accepted)


def test_speed_is_split(scores):
    for score in (s for s in scores if s["task"] == "speed"):
        own = {p: score[f"{p}_us"] for p in ("route", "select", "attend", "other")}
        assert min(own.values()) >= 0
        assert own["route"] + own["select"] > 0
        parts = sum(own.values())
        # Medians of parts do not add up to the median of the sum, least of all on a busy machine.
        assert 0 < parts < 10 * score["step_us"]
        assert score["build_ms"] > 0
        assert score["speedup"] > 0
        assert (score["break_even_tokens"] or 1) > 0
