"""Variants of `generate()` at whole budget: the tokens of the model without Saap.

Where a token differs, the model's own logits must have been equal up to rounding there.
"""

import copy

import pytest
import torch

import saap
from saap.budget import Budget
from saap.hf import Verify, over
from saap.methods.saap import SaapSelector

from ..test_generate import make, random_index
from .hostile import cases, torch_seed

pytestmark = [pytest.mark.bad_input, pytest.mark.filterwarnings("ignore:Unfeasible length")]
FAMILIES = ("llama", "gemma3", "gemma2", "smollm3", "gpt_oss", "qwen3", "cohere2", "yarn")
METHODS = ("saap", "saap", "saap", "blend", "quest", "dense", "oracle-tokens")
ROUNDING = 2e-3
"""Of logits about as large as 1: far above what an order of sums does, far below a lost row."""


@pytest.fixture(scope="module")
def models():
    made = {}

    def get(family):
        if family not in made:
            model = make(family).eval()
            made[family] = model, random_index(model)
        return made[family]

    return get


def inputs_of(own, generator, batch, most):
    n = own.randrange(1, most)
    padding = [own.choice((0, 0, own.randrange(n))) for _ in range(batch)]
    ids = torch.randint(3, 96, (batch, n), generator=generator)
    mask = (torch.arange(n) >= torch.tensor(padding)[:, None]).long()
    return {"input_ids": ids.where(mask > 0, 0), "attention_mask": mask}


def options_of(own, batch):
    options = {"max_new_tokens": own.choice((1, 2, 5, 12)), "pad_token_id": 0}
    way = own.choice(("greedy", "greedy", "sample", "beams"))
    if way == "beams":
        options["num_beams"] = own.choice((2, 3))
        options["num_return_sequences"] = own.choice((1, 2))
    if way == "sample":
        options |= {
            "do_sample": True,
            "top_k": own.choice((0, 5, 50)),
            "top_p": own.choice((1.0, 0.8)),
        }
        options["num_return_sequences"] = own.choice((1, 2))
    options.setdefault("do_sample", False)
    options["eos_token_id"] = own.choice((-1, -1, own.randrange(3, 96), [7, 9, 11]))
    for name, values in {
        "repetition_penalty": (1.3,), "no_repeat_ngram_size": (2,), "min_new_tokens": (3,),
        "prefill_chunk_size": (1, 7, 64), "output_scores": (True,),
    }.items():  # fmt: skip
        if own.random() < 0.15:
            options[name] = own.choice(values)
    return options


def generated(model, seed, inputs, options, cache=None):
    torch.manual_seed(seed)
    given = {} if cache is None else over(cache)
    found = model.generate(**inputs, **options, **given)
    return found if isinstance(found, torch.Tensor) else found.sequences


def assert_same(model, ours, true, mask, sampled):
    """Up to the first token at which both choices were equal up to rounding."""
    if ours.shape == true.shape and torch.equal(ours, true):
        return
    n = min(ours.shape[1], true.shape[1])
    rows = len(ours) // len(mask)
    for b in range(len(ours)):
        differ = (ours[b, :n] != true[b, :n]).nonzero()
        at = int(differ[0]) if len(differ) else n
        own_mask = torch.cat([mask[b // rows], torch.ones(at - mask.shape[1]).long()])[None]
        ids = true[b : b + 1, :at]
        positions = (own_mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            logits = model(ids, attention_mask=own_mask, position_ids=positions).logits[0, -1]
        if len(differ):
            pair = logits[[ours[b, at], true[b, at]]]
            assert sampled or float((pair[0] - pair[1]).abs()) < ROUNDING, (b, at, pair)


def test_variants_of_generate(models, monkeypatch):
    monkeypatch.setattr(SaapSelector, "least_rows", 24)
    for own, counts in cases("variants of generate", 14, one_in=4):
        model, index = models(own.choice(FAMILIES))
        method = own.choice(METHODS)
        budget = Budget(
            max_tokens=10**6, n_sink=own.choice((0, 4)), window=own.choice((1, 8, 20)),
            flush_every=own.choice((None, 1, 8)),
        )  # fmt: skip
        generator, batch = torch_seed(own), own.choice((1, 1, 2, 3))
        inputs, options = inputs_of(own, generator, batch, 110), options_of(own, batch)
        verify = None
        if "num_beams" not in options and "prefill_chunk_size" not in options:
            verify = own.choice((None, None, Verify(3, adapt=False)))
        sampled = options["do_sample"]
        if verify is not None and sampled:  # other random numbers are drawn
            options["do_sample"] = sampled = False
            options.pop("num_return_sequences", None)
            options.pop("top_k"), options.pop("top_p")
        seed = own.getrandbits(30)
        expected = generated(model, seed, inputs, options)
        needs = saap.METHODS[method].needs_index
        with saap.attached(
            model, index if needs else None, budget, method=method, verify=verify
        ) as saap_model:
            cache = saap_model.cache(capacity=own.choice((0, 0, 300)))
            recorded = own.random() < 0.5
            if recorded:
                cache.activate_past_recording()
            ours = generated(model, seed, inputs, options, cache)
            assert_same(model, ours, expected, inputs["attention_mask"], sampled)
            counts["tokens"] = counts.get("tokens", 0) + ours.numel()
            if len(ours) > 1 or len(cache.lengths) > 1 or own.random() < 0.3:
                continue
            # The next turn goes on over the same cache, or over a copy of it that is cut back.
            more = torch.cat(
                [ours, torch.randint(3, 96, (1, own.randrange(1, 40)), generator=generator)], 1
            )
            turn = {
                "input_ids": more,
                "attention_mask": torch.cat(
                    [
                        inputs["attention_mask"],
                        torch.ones(1, more.shape[1] - inputs["input_ids"].shape[1]).long(),
                    ],
                    1,
                ),
            }
            options = {
                "max_new_tokens": 6,
                "do_sample": False,
                "eos_token_id": -1,
                "pad_token_id": 0,
            }
            if own.random() < 0.3:
                cache = copy.deepcopy(cache)
            kept = cache.get_seq_length()
            if own.random() < 0.4:
                cut = own.randrange(1, max(2, min(6, kept)))
                try:
                    cache.crop(-cut)
                except ValueError as error:  # a window was full, and the past was not kept
                    assert "activate_past_recording" in str(error)
                    assert not recorded
                    assert cache.get_seq_length() == kept
            second = generated(model, seed, turn, options, cache)
            expected = generated(model, seed, turn, options)
            assert_same(model, second, expected, turn["attention_mask"], False)
            counts["turns"] = counts.get("turns", 0) + 1
