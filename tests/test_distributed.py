"""A context over several processes: the same selection, outputs and tokens as in one."""

import math
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from saap.budget import Budget
from saap.distributed import choice
from saap.distributed.selector import SplitSelector
from saap.kernels.codes import coarse_scores, encode, select_rows, weigh_rows
from saap.methods import find_method
from saap.methods.saap import SaapSelector
from saap.selector import LayerInfo

from . import split_worker
from .kernels.code_cases import rows, whole_numbers

WORKER = Path(__file__).with_name("split_worker.py")
LIMIT = 240  # seconds; a hang is a failure


def run_ranks(n: int, scenario: str, folder: Path, *more: str):
    """Exit codes, errors and the seconds from the first rank's end to the last one's."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(n):
        env = {
            **os.environ, "RANK": str(rank), "WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1",
        }  # fmt: skip
        command = [sys.executable, str(WORKER), scenario, str(folder), *more]
        ranks.append(subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True))
    try:
        began = time.monotonic()
        first = None
        while any(rank.poll() is None for rank in ranks):
            assert time.monotonic() - began < LIMIT, "a rank hangs"
            if first is None and any(rank.poll() is not None for rank in ranks):
                first = time.monotonic()
            time.sleep(0.02)
        seconds = time.monotonic() - (first or time.monotonic())
        errors = [rank.communicate()[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return [rank.returncode for rank in ranks], errors, seconds


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    codes, errors, _ = run_ranks(2, "two_ranks", folder)
    assert (folder / "0.pt").exists(), errors
    return codes, errors, [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    folder = tmp_path_factory.mktemp("four")
    codes, errors, seconds = run_ranks(4, "four_ranks", folder)
    assert (folder / "0.pt").exists(), errors
    return codes, errors, seconds, [torch.load(folder / f"{rank}.pt") for rank in range(4)]


def check_store(ranks: list[list[dict]], single: list[dict], weights: list | None = None) -> None:
    """`weights`: where rows may be exchanged for others of equal weight, those of all rows."""
    steps = 0
    for number, one in enumerate(single):
        outs = [rank[number]["out"] for rank in ranks]
        assert all(torch.equal(outs[0], other) for other in outs)
        swapped = 0
        for head, tokens in enumerate(one.get("tokens", ())):
            held = [rank[number]["tokens"] for rank in ranks]
            together = sorted(t for own in held if own for t in own[head])
            assert len(together) == len(set(together))
            differ = set(together) ^ set(tokens)
            if differ and weights is not None:
                first = split_worker.STORE_BUDGET.n_sink
                logs = [float(weights[steps][head, t - first].log()) for t in differ]
                assert max(logs) - min(logs) < 1e-5
                swapped += len(differ)
            else:
                assert not differ
        assert swapped <= 2
        steps += "tokens" in one
        if not swapped:
            # Sums over parts, in another order: a few units in the last place.
            error = (outs[0] - one["out"]).abs().max() / one["out"].abs().max()
            assert error < 32 * torch.finfo(torch.float32).eps
            assert torch.allclose(ranks[0][number]["lse"], one["lse"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["even", "ragged", "dense"])
def test_two_ranks_choose_and_attend_as_one(two, name):
    given = {
        "even": {"chunks": (1400,), "steps": 20},
        "ragged": {"steps": 20},
        "dense": {"method": "dense", "steps": 2},
    }[name]
    check_store([rank["stores"][name] for rank in two[2]], split_worker.single(1500, **given))


def test_two_ranks_choose_per_head_as_one_but_for_equal_weights(two, monkeypatch):
    weights, select = [], SaapSelector.select

    def kept(self, query, middle, budget, room):
        q = self.query_map(query.q_rope)[0, :, None]
        weights.append(weigh_rows(q, self.codes, middle.n_rows[0])[0][:, 0])
        return select(self, query, middle, budget, room)

    monkeypatch.setattr(SaapSelector, "select", kept)
    single = split_worker.single(1500, share="head", steps=8)
    check_store([rank["stores"]["head"] for rank in two[2]], single, weights)


def test_four_ranks_over_ragged_parts_choose_and_attend_as_one(four):
    check_store([rank["ragged"] for rank in four[3]], split_worker.single(1500, steps=12))


def check_rest(ranks: list[list[dict]], **given) -> None:
    """All ranks add the same, which is what one process adds, but for how sums are rounded."""
    one, dense = (split_worker.single(1500, **given, **own)
                  for own in ({"estimate": True}, {"method": "dense"}))  # fmt: skip
    left_out = split_worker.single(1500, **given)
    for number, exact in enumerate(dense):
        outs = [rank[number]["out"] for rank in ranks]
        assert all(torch.equal(outs[0], other) for other in outs)
        assert torch.equal(ranks[0][number]["lse"], ranks[-1][number]["lse"])
        # Covariances are rounded to 8 bits once they are added up.
        scale = one[number]["out"].abs().max()
        assert (outs[0] - one[number]["out"]).abs().max() < 2e-3 * scale
        assert torch.allclose(ranks[0][number]["lse"], one[number]["lse"], rtol=0, atol=2e-3)
        if "tokens" in exact:
            errors = [(out - exact["out"]).norm() for out in (outs[0], left_out[number]["out"])]
            assert errors[0] < 0.5 * errors[1]


def test_two_ranks_estimate_the_rest_as_one(two):
    check_rest([rank["stores"]["rest"] for rank in two[2]], steps=20)


def test_two_ranks_estimate_the_rest_of_each_head(two):
    check_rest([rank["stores"]["rest by head"] for rank in two[2]], share="head", steps=2)


def test_four_ranks_some_without_rows_estimate_the_rest_as_one(four):
    check_rest([rank["rest"] for rank in four[3]], steps=12)


@pytest.mark.parametrize(
    ("name", "given"), [("even", {"new": 48}), ("ragged", {"chunk": 512, "new": 24})]
)
def test_same_greedy_tokens(two, name, given):
    single = split_worker.generate(None, **given)
    ranks = [rank[name] for rank in two[2]]
    assert all(rank["tokens"] == single["tokens"] for rank in ranks)
    assert math.isclose(sum(rank["visited"] for rank in ranks), single["visited"])
    assert max(rank["bytes"] for rank in ranks) < 0.8 * single["bytes"]


def test_same_greedy_tokens_of_dense_attention(two):
    single = split_worker.generate(None, method="dense", new=6, n=400)
    for rank in two[2]:
        assert rank["dense"]["tokens"] == single["tokens"]


@pytest.mark.slow
def test_same_256_greedy_tokens(tmp_path):
    run_ranks(2, "two_ranks", tmp_path, "slow")
    single = split_worker.generate(None, new=256)
    assert all(torch.load(tmp_path / f"slow{r}.pt")["tokens"] == single["tokens"] for r in (0, 1))


def test_traffic_is_as_computed_and_does_not_grow_with_the_context(two):
    heads, n_kv, dim = split_worker.HEADS, split_worker.N_KV, split_worker.DIM
    digits = sum(2**bits for _, bits in choice.DIGITS)
    expected = 4 * ((heads + n_kv) * (digits + 1) + 3 * heads + heads * (dim + 1))
    for rank in two[2]:
        for name in ("even", "ragged", "long"):
            assert rank["stores"][name][-1]["sent"] == expected
        estimated = [step["sent"] for step in rank["stores"]["rest"] if "sent" in step]
        assert min(estimated) == expected + 8 * (heads + n_kv)  # where no rows join the sums
        assert rank["stores"]["dense"][-1]["sent"] == 4 * heads * (dim + 1)


def test_what_differs_is_named_on_both_ranks(two):
    expected = {
        "budget": "GroupError: all ranks must have the same max_tokens of the budget; got 64 on "
        "rank 0 and 65 on rank 1",
        "context": "ValueError: a context must have a token for each of 2 ranks; got 1 tokens",
        "parts": "ValueError: parts must be 1 numbers of tokens above 0, for all of 2 ranks but "
        "the last, which holds what follows; got [5, 5]",
        "method": "ValueError: method must be saap or dense with a group, whose choice over "
        "several ranks is built; got 'quest'",
        "methods": "GroupError: all ranks must have the same method; got saap SaapSearch",
        "version": "GroupError: all ranks must have the same version of saap and torch; got 0.1.0",
        "model": "GroupError: all ranks must have the same model; got llama",
        "beams": "ValueError: a split context must be one sequence without padding; got a batch",
    }
    for rank in two[2]:
        assert set(rank["refused"]) == set(expected)
        for name, message in expected.items():
            assert rank["refused"][name].startswith(message), name


def test_ranks_with_other_texts_end_with_one_line_each(two):
    codes, errors, _ = two
    assert codes == [2, 2]
    for rank, error in enumerate(errors):
        lines = [line for line in error.splitlines() if line.startswith("error:")]
        assert len(lines) == 1
        assert lines[0].startswith(f"error: rank {rank}: all ranks must have the same text; got")
        assert "Traceback" not in error


def test_a_killed_rank_ends_the_others_within_seconds(four):
    codes, errors, seconds, _ = four
    assert codes[2] == -9
    assert [codes[rank] for rank in (0, 1, 3)] == [2, 2, 2]
    assert seconds < 10
    for rank in (0, 1, 3):
        lines = errors[rank].strip().splitlines()
        assert lines[-1].startswith(
            f"error: rank {rank}: all 4 ranks must take part until the end"
        )
        assert "Traceback" not in errors[rank]


class Alone:
    """A group of one rank that counts nothing: what is chosen is then a sort's answer."""

    rank, size = 0, 1

    def add(self, own):
        return own

    def gather(self, own):
        return [own]


@pytest.mark.parametrize("k", [1, 7, 40, 150, 400])
def test_counting_finds_what_sorting_finds(k):
    keys = torch.rand(3, 300, generator=torch.Generator().manual_seed(k))
    keys[0] -= 0.7  # scores may be below 0
    keys[0, 100:200] = 0.1  # equal keys: the first ones are taken
    keys[1] = keys[1] * 1e-40
    keys[2, :250] = 0.0
    keys[2, 100:110] = -0.0
    used = torch.ones_like(keys, dtype=torch.bool)
    used[:, ::5] = False
    found = choice.among_largest(keys, used, k, Alone())
    for head in range(3):
        order = torch.where(used[head], keys[head], -torch.inf).argsort(
            descending=True, stable=True
        )
        best = order[: min(k, int(used[head].sum()))]
        assert sorted(best.tolist()) == found[head].nonzero()[:, 0].tolist()


@pytest.mark.parametrize("n", [1, 513, 900])
def test_weights_of_rows_as_the_reference_has_them(n):
    torch.manual_seed(n)
    codes = encode(torch.randn(1, 2, 900, 64), torch.ones(1, 2, 64))
    q = torch.randn(4, 3, 64)
    expected = weigh_rows(q, codes, n, impl="reference")
    found = weigh_rows(q, codes, n, impl="numba")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n", [1, 513, 900])
def test_coarse_scores_are_those_that_a_choice_goes_by(n):
    """To the last bit: many rows are alike by so short a code, and all ranks have to agree."""
    torch.manual_seed(n)
    codes = encode(torch.randn(1, 2, 900, 64), torch.ones(1, 2, 64))
    q, query_map = whole_numbers(1, 1, 2, 3, 48, 64)
    found = coarse_scores(q[0].unflatten(0, (2, 3)), codes, n, query_map, "numba")
    expected = coarse_scores(q[0].unflatten(0, (2, 3)), codes, n, query_map, "reference")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    k = min(n, 40)
    every = select_rows(
        q, codes, [n], max_tokens=k, n_candidates=k, query_map=query_map, share="head"
    )
    for head, own in enumerate(found.flatten(0, 1)):
        best = own.argsort(descending=True, stable=True)[:k].sort().values
        assert rows(every, 0, head) == best.tolist()


@pytest.mark.bad_input
def test_a_split_context_refuses_a_least_weight():
    selector = SplitSelector(find_method("saap")().selector(LayerInfo(0.25)), group=None)
    with pytest.raises(ValueError, match=r"min_weight must be None in a split context.*got 0.1"):
        selector.check_budget(Budget(max_tokens=9, min_weight=0.1))
