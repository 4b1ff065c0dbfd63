"""A selector's own mistakes are caught where `KVStore.debug` is set, by one clear line."""

import dataclasses

import pytest
import torch

import saap
from saap.budget import Budget
from saap.kv import KVStore
from saap.methods import Method
from saap.selector import Selector, check_ranges

from .test_generate import call, make, prompt

BUDGET = Budget(max_tokens=8, n_sink=4, window=8, flush_every=8)


class Given(Selector):
    """Visits the ranges that it was given, `[(start, length), ...]`."""

    def __init__(self, pairs):
        self.pairs = pairs

    def select(self, query, middle, budget, room):
        heads = (len(query.q_rope), middle.n_kv, 1)
        starts, lengths = torch.tensor(self.pairs, dtype=torch.int32).T
        return tuple(t[None, None].repeat(heads) for t in (starts, lengths))


@dataclasses.dataclass
class Wrong(Method):
    pairs: list
    name = "wrong"
    index, seed = None, 0

    def selector(self, layer):
        return Given(self.pairs)


WRONG = {
    "overlap": ([(4, 4), (7, 3)], "must not overlap; got row 7 twice for query 0, head 0"),
    "the same twice": ([(5, 2), (4, 1), (5, 2)], "must not overlap; got row 5 twice"),
    "sinks": ([(3, 2)], r"must be rows 4 to 27; got start 3 and length 2"),
    "tail": ([(20, 9)], r"must be rows 4 to 27; got start 20 and length 9"),
    "negative": ([(8, -1)], "got start 8 and length -1"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_method_that_returns_wrong_rows_is_caught(wrong, monkeypatch):
    pairs, message = WRONG[wrong]
    model = make("llama")
    tokens = prompt(1, 40)
    with saap.attached(model, budget=BUDGET, method=Wrong(pairs)) as saap_model:
        cache = saap_model.cache()
        call(model, cache, tokens[:, :39])
        with pytest.raises(ValueError, match=message):
            call(model, cache, tokens[:, 39:])
    if wrong != "negative":  # which attention itself refuses
        monkeypatch.setattr(KVStore, "debug", False)
        with saap.attached(model, budget=BUDGET, method=Wrong(pairs)) as saap_model:
            cache = saap_model.cache()
            call(model, cache, tokens[:, :39])
            call(model, cache, tokens[:, 39:])


def test_unused_ranges_may_stand_anywhere():
    starts = torch.tensor([[[9, 0, 4, 9]], [[4, 10, 11, 5]]])
    lengths = torch.tensor([[[2, 0, 5, 0]], [[1, 1, 0, 5]]])
    check_ranges(starts, lengths, [7], 4)
    check_ranges(starts, lengths, [7, 7], 4)
    with pytest.raises(ValueError, match="rows 4 to 9; got start 10 and length 1 for query 1"):
        check_ranges(starts, lengths, [7, 6], 4)
