"""Benchmarks that choose rows in `saap`'s place, in plain PyTorch: they choose what it would."""

import pytest
import torch

from benchmarks.blocks import BlockChoice
from benchmarks.candidates import Choice, chosen_by, everything, of_each_head
from saap.budget import Budget
from saap.kernels.codes.layout import GROUPS
from saap.kv import KVStore
from saap.methods import find_method
from saap.methods.saap import SaapSearch
from saap.selector import LayerInfo

BUDGET = Budget(max_tokens=64, n_sink=4, window=8, estimate_rest=False)
FEW = SaapSearch(width=1.0, least=100, margin=36, one_of=2**31)


def chosen(search: SaapSearch) -> list[set[int]]:
    """Rows that a step visits, of each KV head of two query heads."""
    generator = torch.Generator().manual_seed(3)
    method = find_method("saap")(None)
    method.search_options = search
    store = KVStore(method.selector(LayerInfo(sm_scale=0.25)), BUDGET)
    keys, queries = (torch.randn(1, h, 900, 16, generator=generator) for h in (2, 4))
    store.append(keys, keys, keys)
    store.attend(queries, queries)
    q = torch.randn(1, 4, 16, generator=generator) * 2
    ranges = (t[0].tolist() for t in store.select(q, q))
    return [
        {row for first, n in zip(*own, strict=True) for row in range(first, first + n)}
        for own in zip(*ranges, strict=True)
    ]


def shared(a: list[set[int]], b: list[set[int]]) -> float:
    """Of the rows of one choice, the share that another visits."""
    assert [len(own) for own in a] == [len(own) for own in b]
    return sum(map(len, map(set.intersection, a, b))) / sum(map(len, a))


@pytest.mark.parametrize(
    ("search", "choice"),
    [
        (SaapSearch(width=None), Choice(GROUPS, everything)),
        (FEW, Choice(GROUPS, of_each_head(100))),
        (SaapSearch(), BlockChoice(16, 1.0, 4.0)),
    ],
)
def test_it_chooses_what_saap_chooses(search, choice):
    """But for rows near the edge: kernels round queries."""
    own = chosen(search)
    with chosen_by(choice):
        assert shared(own, chosen(SaapSearch())) > 0.97


def test_other_candidates_are_another_choice():
    own = chosen(SaapSearch())
    with chosen_by(Choice(GROUPS, of_each_head(40))):
        assert shared(own, chosen(SaapSearch())) < 0.97
