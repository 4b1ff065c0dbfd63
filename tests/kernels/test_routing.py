"""Scores of cells, on every implementation, against what their formula says in float64."""

import pytest
import torch

from saap.kernels.routing import cell_weights, reference

from ..torch_threads import torch_threads
from .routing_cases import expected_weights, problem, random

IMPLS = ("reference", "numba")


def assert_expected(found, expected):
    """To float32's accuracy of scores of about 10."""
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("share", ["group", "head"])
@pytest.mark.parametrize("network", [True, False])
@pytest.mark.parametrize(
    "change",
    [{}, {"by_size": True}, {"interleaved": True}, {"n_segments": 16}, {"n_segments": 20}],
    ids=str,
)
def test_weights_are_those_of_the_formula(impl, share, network, change):
    p = problem(n_segments=change.get("n_segments", 4)) | change | {"share": share}
    p["network"] = p["network"] if network else None
    found, expected = cell_weights(**p, impl=impl), expected_weights(p)
    assert found.shape == expected.shape
    assert_expected(found, expected)


@pytest.mark.parametrize("share", ["group", "head"])
def test_the_reference_in_float64_is_the_formula(share):
    p = problem() | {"share": share, "by_size": True}
    p |= {name: p[name].double() for name in ("q", "keys", "inv_freq")}
    p["network"] = tuple(t.double() for t in p["network"])
    found = reference.cell_weights(**p)
    torch.testing.assert_close(found, expected_weights(p), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_network_in_8_bits(impl):
    p = problem()
    *most, w2, b2 = p["network"]
    generator = torch.Generator().manual_seed(1)
    w2 = torch.randint(-127, 128, w2.shape, generator=generator, dtype=torch.int8)
    scale = 0.01 * (1 + random(*w2.shape[:2], seed=9).abs())
    p["network"] = (*most, w2, b2, scale)
    plain = p | {"network": (*most, w2 * scale[..., None], b2)}
    assert_expected(cell_weights(**p, impl=impl), expected_weights(plain))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("n_kv", "group", "nlist"), [(1, 1, 15), (3, 3, 33), (2, 8, 64)])
def test_any_number_of_heads_and_buckets(impl, n_kv, group, nlist):
    p = problem(n_kv, group, nlist, batch=1)
    assert_expected(cell_weights(**p, impl=impl), expected_weights(p))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("nlist", [1, 2, 5])
@pytest.mark.parametrize("n_segments", [1, 3])
def test_few_buckets_without_a_network(impl, nlist, n_segments):
    p = problem(nlist=nlist, n_segments=n_segments) | {"network": None}
    assert_expected(cell_weights(**p, impl=impl), expected_weights(p))


@pytest.mark.parametrize("impl", IMPLS)
def test_far_away_angles_keep_their_digits(impl):
    p = problem() | {
        "n_middle": torch.tensor([1_000_000, 999_000]),
        "distance": torch.tensor([1_000_100, 1_000_000]),
    }
    assert_expected(cell_weights(**p, impl=impl), expected_weights(p))


@pytest.mark.parametrize("impl", IMPLS)
def test_sequences_may_share_their_cells_and_differ_in_distance(impl):
    p = problem()
    together = cell_weights(**p | {"sizes": p["sizes"][:1]}, impl=impl)
    for b in range(2):
        own = {n: p[n][b : b + 1] for n in ("q", "n_middle", "distance")}
        alone = cell_weights(**p | own | {"sizes": p["sizes"][:1]}, impl=impl)
        torch.testing.assert_close(alone[0], together[b], rtol=1e-5, atol=1e-8)
    numbers = {n: int(p[n][1]) for n in ("n_middle", "distance")}
    shared = cell_weights(**p | numbers, impl=impl)
    torch.testing.assert_close(shared[1], cell_weights(**p, impl=impl)[1], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("network", [True, False])
def test_no_keys_weigh_nothing(impl, network):
    p = problem()
    p["sizes"] = torch.zeros_like(p["sizes"])
    p["network"] = p["network"] if network else None
    assert (cell_weights(**p, impl=impl) == 0).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_large_scores_do_not_overflow(impl):
    p = problem()
    p["keys"] = p["keys"] * 1e3
    found = cell_weights(**p, impl=impl)
    assert found.isfinite().all()
    torch.testing.assert_close(found.double(), expected_weights(p), rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("network", [True, False])
@pytest.mark.parametrize("where", ["q", "keys"])
def test_nan_stays_with_the_heads_that_have_it(impl, network, where):
    p = problem() | {"share": "head"}
    p["network"] = p["network"] if network else None
    clean = cell_weights(**p, impl=impl)
    p[where] = p[where].clone()
    p["q"][0, 3, 5] = torch.nan if where == "q" else p["q"][0, 3, 5]
    if where == "keys":
        p["keys"][1, 7, 2] = torch.nan
        p["sizes"][:, 1, 28:32] = 1  # the cells of that bucket
    found = cell_weights(**p, impl=impl)
    wrong = found.isnan().any(-1)
    expected = torch.zeros_like(wrong)
    expected[(0, 3) if where == "q" else (slice(None), slice(2, 4))] = True
    assert torch.equal(wrong, expected)
    assert torch.equal(found.isnan().all(-1), expected)
    assert torch.equal(found[~expected], clean[~expected])


@pytest.mark.parametrize("impl", IMPLS)
def test_a_sign_still_to_be_changed_is_changed(impl):
    p = problem()
    expected = cell_weights(**p, impl=impl)
    names = ("q", "keys", "inv_freq")
    lazy = p | {name: torch._neg_view(-p[name]) for name in names}
    lazy["network"] = tuple(torch._neg_view(-t) for t in p["network"])
    assert torch.equal(cell_weights(**lazy, impl=impl), expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_no_sequences(impl):
    p = problem()
    p |= {name: p[name][:0] for name in ("q", "sizes", "n_middle", "distance")}
    assert cell_weights(**p, impl=impl).shape == (0, 2, 19 * 4)


def test_none_takes_what_can():
    p = problem()
    assert torch.equal(cell_weights(**p), cell_weights(**p, impl="numba"))
    p["keys"] = p["keys"].bfloat16()
    assert torch.equal(cell_weights(**p), cell_weights(**p, impl="reference"))


def test_16_bit_queries_are_read_as_they_are():
    p = problem()
    p["q"] = p["q"].bfloat16()
    found = cell_weights(**p, impl="numba")
    assert_expected(found, expected_weights(p | {"q": p["q"].float()}))


def changed(name, index):
    """`change(p)` that replaces one tensor, of the network if `name` is a number."""

    def change(p):
        if isinstance(name, str):
            return {name: index(p[name])}
        network = list(p["network"])
        network[name] = index(network[name])
        return {"network": tuple(network)}

    return change


CANNOT = {
    "head_dim": (
        lambda p: {"q": p["q"][..., :20], "keys": p["keys"][..., :20], "network": None},
        r"head_dim must be a multiple of \d+ .*; got 20",
    ),
    "keys": (
        changed("keys", lambda t: t.bfloat16()),
        r"keys must .*float32.*; got torch.bfloat16",
    ),
    "inv_freq": (
        changed("inv_freq", lambda t: t.double()),
        r"inv_freq must .*; got torch.float64",
    ),
    "q": (changed("q", lambda t: t.double()), r"q must have dtype float32, .*; got torch.float64"),
    "w1": (changed(2, lambda t: t.half()), r"network's w1 must .*; got torch.float16"),
    "hidden": (lambda p: problem(hidden=20), r"hidden must be a multiple of \d+ .*; got 20"),
    "no hidden": (lambda p: problem(hidden=0), r"hidden must be a multiple of \d+ .*; got 0"),
    "buckets": (lambda p: problem(nlist=4), r"at least \d+ buckets .*; got 4"),
}


@pytest.mark.parametrize(("change", "message"), CANNOT.values(), ids=CANNOT)
def test_what_numba_cannot_do_is_told_and_none_takes_the_reference(change, message):
    p = problem()
    p |= change(p)
    with pytest.raises(ValueError, match=message):
        cell_weights(**p, impl="numba")
    assert torch.equal(cell_weights(**p), cell_weights(**p, impl="reference"))


WRONG = {
    "q's rank": (changed("q", lambda t: t[0]), r"q must be \[B, Hq, D\]; got shape \(4, 32\)"),
    "q of integers": (changed("q", lambda t: t.int()), r"q must have dtype .*; got torch.int32"),
    "D": (changed("keys", lambda t: t[..., :16]), r"keys must be .* D = 32 .*\(2, 19, 16\)"),
    "no buckets": (changed("keys", lambda t: t[:, :0]), r"keys must be .*\(2, 0, 32\)"),
    "heads": (changed("q", lambda t: t[:, :3]), r"q must have a multiple of the 2 heads .* got 3"),
    "too many pairs": (
        changed("inv_freq", lambda t: t.repeat(3)),
        r"inv_freq must be .* at most D / 2 = 16 pairs; got shape \(24,\)",
    ),
    "cells": (changed("sizes", lambda t: t[..., :-1]), r"sizes must be .*\(2, 2, 76\); got .* 75"),
    "sizes of another batch": (
        changed("sizes", lambda t: t.repeat(2, 1, 1)),
        r"sizes must be \[B or 1, .*; got shape \(4, 2, 76\)",
    ),
    "int64 sizes": (changed("sizes", lambda t: t.long()), r"sizes must .* int32; got torch.int64"),
    "sizes elsewhere": (
        changed("sizes", lambda t: t.to("meta")),
        "sizes must be on cpu; got meta",
    ),
    "n_middle": (changed("n_middle", lambda t: t[:1]), r"n_middle must be .* B = 2; got .*\(1,\)"),
    "distance": (changed("distance", lambda t: t.float()), r"distance must be .*torch.float32"),
    "segments": (lambda p: {"n_segments": 0}, "n_segments must be at least 1; got 0"),
    "other segments": (lambda p: {"n_segments": 5}, r"sizes must be .*\(2, 2, 95\); got .* 76"),
    "trained_share": (lambda p: {"trained_share": 1.5}, r"trained_share .* 0..1; got 1.5"),
    "share": (lambda p: {"share": "all"}, "share must be 'group' or 'head'; got 'all'"),
    "impl": (lambda p: {"impl": "triton"}, "impl must be .* reference, numba; got 'triton'"),
    "no network": (lambda p: {"network": ()}, "network must be mean, scale, .*; got 0 tensors"),
    "mean": (
        changed(0, lambda t: t[:1]),
        r"network's mean must be \[4, 32\]; got shape \(1, 32\)",
    ),
    "w1's rank": (changed(2, lambda t: t[0]), r"network's w1 must be \[4, 0, 32\]; got .*32, 32"),
    "b1": (changed(3, lambda t: t[:, :8]), r"network's b1 must be \[4, 32\]; got shape \(4, 8\)"),
    "w2": (changed(4, lambda t: t[:, :0]), r"network's w2 must be \[4, 20, 32\]; got .*\(4, 0, 3"),
    "b2": (
        changed(5, lambda t: t[:, :-1]),
        r"network's b2 must be \[4, 20\]; got shape \(4, 19\)",
    ),
    "w2 of 8 bits": (changed(4, lambda t: t.to(torch.int8)), "network's w2 must have dtype float"),
}


@pytest.mark.parametrize("impl", [*IMPLS, None])
@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG)
def test_arguments_that_do_not_fit_are_named(change, message, impl):
    p = problem()
    p |= {"impl": impl} | change(p)
    with pytest.raises(ValueError, match=message):
        cell_weights(**p)


def test_results_do_not_depend_on_the_number_of_threads():
    p, found = problem(batch=1), []
    for n in (1, torch.get_num_threads()):
        with torch_threads(n):
            found.append(cell_weights(**p, impl="numba"))
    assert torch.equal(*found)
