"""lm-eval tasks: the dense beginning, the sparse end; and the adapter where lm-eval is there."""

import importlib.util
import json
import sys

import pytest
import torch

from saap.budget import Budget
from saap.eval import reference
from saap.eval.reader import SparseReader, shortened
from saap.eval.tasks.passkey import make_prompt
from saap.methods import find_method

pytestmark = pytest.mark.many_steps

HAS_LM_EVAL = importlib.util.find_spec("lm_eval") is not None
WIDE = Budget(max_tokens=2000, n_sink=4, window=32)
NARROW = Budget(max_tokens=24, n_sink=4, window=32)


def reader(model, method="dense", budget=WIDE, **options):
    return SparseReader(model, find_method(method)(None), budget, **options)


@pytest.fixture(scope="module")
def prompt(reference_tokenizer):
    import numpy as np

    text = reference.split_held_out()[1]
    made = make_prompt(text, 700, np.random.default_rng(3), n_distractors=1, depth=0.2)
    ids = reference_tokenizer(made.text.decode(), add_special_tokens=False)["input_ids"]
    answer = reference_tokenizer(made.answer, add_special_tokens=False)["input_ids"]
    return ids, answer


@pytest.mark.parametrize("length", [2, 30, 700])
def test_log_likelihood_is_the_models_own(reference_model, prompt, length):
    ids, answer = prompt[0][-length:], prompt[1]
    with torch.no_grad():
        logits = reference_model(torch.tensor([ids + answer])).logits[0, len(ids) - 1 : -1]
    own = logits.log_softmax(-1).gather(-1, torch.tensor(answer)[:, None]).sum()
    found, greedy = reader(reference_model).log_likelihood(ids, answer)
    assert found == pytest.approx(float(own), rel=1e-4)
    assert greedy == bool((logits.argmax(-1) == torch.tensor(answer)).all())


def test_the_end_of_a_prompt_is_sparse(reference_model, prompt):
    ids, answer = prompt
    dense = reader(reference_model).log_likelihood(ids, answer)[0]
    sparse = reader(reference_model, "streaming", NARROW).log_likelihood(ids, answer)[0]
    assert sparse < dense - 1  # the key stands where streaming does not look
    # A prompt that sinks, window and question hold is read to its end but one token.
    short = ids[-90:]
    dense, sparse = (
        reader(reference_model, name, budget).log_likelihood(short, [10])[0]
        for name, budget in (("dense", WIDE), ("streaming", Budget(max_tokens=90, window=32)))
    )
    assert sparse == pytest.approx(dense, rel=1e-4)


def test_the_dense_part_is_read_once(reference_model, prompt, monkeypatch):
    from saap.eval import reader as module

    reads = []
    read = module.hf.read_context
    monkeypatch.setattr(
        module.hf, "read_context", lambda *a, **k: reads.append(len(a[1])) or read(*a, **k)
    )
    own = reader(reference_model, "streaming", NARROW, question_tokens=40)
    ids, answer = prompt
    first = own.log_likelihood(ids, answer)
    own.log_likelihood(ids, answer[::-1])
    assert reads == [len(ids) - 40]
    assert own.log_likelihood(ids, answer) == first


def test_generation_stops(reference_model, prompt):
    ids, answer = prompt
    found = reader(reference_model).generate(ids, 9, lambda tokens: len(tokens) == 7)
    assert found == answer
    assert reader(reference_model).generate(ids, 3, lambda tokens: False) == answer[:3]


def test_bad_prompts(reference_model):
    with pytest.raises(ValueError, match="question_tokens must be at least 1; got 0"):
        reader(reference_model, question_tokens=0)
    with pytest.raises(ValueError, match="a prompt must have at least 2 tokens; got 1"):
        reader(reference_model).log_likelihood([3], [4])
    assert shortened([1, 2, 3], 2) == [2, 3]
    assert shortened([1, 2, 3], 0) == []


def test_without_lm_eval_the_command_to_install_is_told(monkeypatch):
    for name in [n for n in sys.modules if n.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "saap.eval.lm_eval", raising=False)
    with pytest.raises(ImportError, match=r"pip install 'lm-eval>=0\.4\.13'") as caught:
        importlib.import_module("saap.eval.lm_eval")
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not HAS_LM_EVAL, reason="needs lm-eval")
def test_tasks_of_lm_eval(reference_model, reference_tokenizer, tmp_path):
    import lm_eval
    import numpy as np

    from saap.eval.lm_eval import SaapLM

    text = reference.split_held_out()[1]
    rows = []
    for number in range(4):
        rng = np.random.default_rng(number)
        made = make_prompt(text, 900, rng, n_distractors=2, depth=0.3)
        wrong = made.answer[::-1]
        rows.append({"prompt": made.text.decode(), "key": made.answer, "wrong": wrong})
    data = tmp_path / "keys.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = {
        "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test", "doc_to_text": "{{prompt}}", "target_delimiter": "",
    }  # fmt: skip
    said = {
        **shared, "task": "keys_said", "output_type": "generate_until", "doc_to_target": "{{key}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    }  # fmt: skip
    chosen = {
        **shared, "task": "keys_chosen", "output_type": "multiple_choice",
        "doc_to_choice": ["{{key}}", "{{wrong}}"], "doc_to_target": 0,
        "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    found = {}
    for method, budget in (("dense", WIDE), ("streaming", NARROW)):
        lm = SaapLM(reference_model, method, budget, tokenizer=reference_tokenizer)
        made = lm_eval.simple_evaluate(model=lm, tasks=[said, chosen], bootstrap_iters=0)
        found[method] = made["results"]
    assert found["dense"]["keys_said"]["exact_match,none"] == 1.0
    assert found["streaming"]["keys_said"]["exact_match,none"] == 0.0
    assert found["dense"]["keys_chosen"]["acc,none"] == 1.0
