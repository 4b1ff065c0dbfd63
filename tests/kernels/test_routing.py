"""Scoring and selection of cells on a CPU, against what their formulas say in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saap.index.lists import bucket_ranges, offsets_of
from saap.kernels.routing import numba as cpu

D, PAIRS = 32, 8


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def problem(n_kv=2, group=2, nlist=19, n_segments=4, batch=2, hidden=32, seed=0):
    heads = n_kv * group
    generator = torch.Generator().manual_seed(seed)
    return {
        "q": random(batch, heads, D, seed=seed),
        "keys": random(n_kv, nlist, D, seed=seed + 1) * 0.3,
        "inv_freq": 50.0 ** (-torch.arange(0, PAIRS) / PAIRS),
        "sizes": torch.randint(
            0, 4, (batch, n_kv, nlist * n_segments), generator=generator, dtype=torch.int32
        ),
        "n_middle": torch.tensor([900, 37][:batch]),
        "distance": torch.tensor([1000, 64][:batch]),
        "n_segments": n_segments,
        "network": (
            random(heads, D, seed=2) * 0.1,
            1 + random(heads, D, seed=3).abs(),
            random(heads, hidden, D, seed=4) * 0.2,
            random(heads, hidden, seed=5),
            random(heads, nlist + 1, hidden, seed=6) * 0.2,
            random(heads, nlist + 1, seed=7),
        ),
        "trained_share": 0.3,
        "interleaved": False,
        "share": "group",
        "by_size": False,
    }


def expected_weights(p) -> torch.Tensor:
    """One query head, one cell at a time."""
    q, keys, sizes = p["q"].double(), p["keys"].double(), p["sizes"].double()
    batch, heads, _ = q.shape
    n_kv, nlist, _ = keys.shape
    n_segments, group = p["n_segments"], heads // n_kv
    frequencies = p["inv_freq"].double()
    weights = torch.zeros(batch, heads, nlist * n_segments, dtype=torch.float64)
    for b in range(batch):
        n, distance = int(p["n_middle"][b]), int(p["distance"][b])
        for h in range(heads):
            own = sizes[b if len(sizes) > 1 else 0, h // group]
            scores = torch.empty(nlist, n_segments, dtype=torch.float64)
            for s in range(n_segments):
                age = distance - ((s + 0.5) * n / n_segments - 0.5)
                angle = age * frequencies
                width = max(1.0, n / n_segments)
                damping = (width * frequencies / 2).sin() / (width * (frequencies / 2).sin())
                turned = q[b, h].clone()
                at = torch.arange(PAIRS)
                x, y = (2 * at, 2 * at + 1) if p["interleaved"] else (at, at + PAIRS)
                turned[x] = damping * (q[b, h, x] * angle.cos() - q[b, h, y] * angle.sin())
                turned[y] = damping * (q[b, h, y] * angle.cos() + q[b, h, x] * angle.sin())
                scores[:, s] = keys[h // group] @ turned
            middle = 1.0
            if p["network"]:
                mean, scale, w1, b1, w2, b2 = (t[h].double() for t in p["network"])
                hidden = w1 @ ((q[b, h] - mean) * scale) + b1
                logits = w2 @ (hidden * torch.sigmoid(hidden)) + b2
                scores = p["trained_share"] * logits[:-1, None] + (1 - p["trained_share"]) * scores
                inside = (own.view(nlist, -1).sum(1) * logits[:-1].exp()).sum()
                middle = float(inside / (inside + logits[-1].exp()))
            scores = scores.flatten().masked_fill(own == 0, -torch.inf)
            unnormed = (scores - scores.max()).exp()
            weights[b, h] = middle * unnormed / max(float((unnormed * own).sum()), 1e-300)
    if p["share"] == "group":
        weights = weights.unflatten(1, (n_kv, group)).sum(2)
    if p["by_size"]:
        weights = weights * sizes.repeat_interleave(weights.shape[1] // n_kv, 1)
    return weights


@pytest.mark.parametrize("share", ["group", "head"])
@pytest.mark.parametrize("network", [True, False])
@pytest.mark.parametrize(
    "change",
    [{}, {"by_size": True}, {"interleaved": True}, {"n_segments": 16}, {"n_segments": 20}],
    ids=str,
)
def test_weights_are_those_of_the_formula(share, network, change):
    p = problem(n_segments=change.get("n_segments", 4)) | change | {"share": share}
    p["network"] = p["network"] if network else None
    assert cpu.can_weigh(p["q"], p["keys"], p["network"])
    found, expected = cpu.cell_weights(**p), expected_weights(p)
    assert found.shape == expected.shape
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-7)


def test_a_network_in_8_bits():
    p = problem()
    *most, w2, b2 = p["network"]
    generator = torch.Generator().manual_seed(1)
    w2 = torch.randint(-127, 128, w2.shape, generator=generator, dtype=torch.int8)
    scale = 0.01 * (1 + random(*w2.shape[:2], seed=9).abs())
    p["network"] = (*most, w2, b2, scale)
    assert cpu.can_weigh(p["q"], p["keys"], p["network"])
    plain = p | {"network": (*most, w2 * scale[..., None], b2)}
    torch.testing.assert_close(
        cpu.cell_weights(**p).double(), expected_weights(plain), rtol=1e-4, atol=1e-7
    )


@pytest.mark.parametrize(("n_kv", "group", "nlist"), [(1, 1, 15), (3, 3, 33), (2, 8, 64)])
def test_any_number_of_heads_and_buckets(n_kv, group, nlist):
    p = problem(n_kv, group, nlist, batch=1)
    torch.testing.assert_close(
        cpu.cell_weights(**p).double(), expected_weights(p), rtol=1e-4, atol=1e-7
    )


def test_sequences_may_share_their_cells_and_differ_in_distance():
    p = problem()
    together = cpu.cell_weights(**p | {"sizes": p["sizes"][:1]})
    for b in range(2):
        own = {n: p[n][b : b + 1] for n in ("q", "n_middle", "distance")}
        alone = cpu.cell_weights(**p | own | {"sizes": p["sizes"][:1]})
        assert torch.equal(alone[0], together[b])


def test_no_keys_weigh_nothing():
    p = problem()
    p["sizes"] = torch.zeros_like(p["sizes"])
    assert (cpu.cell_weights(**p) == 0).all()


def test_large_scores_do_not_overflow():
    p = problem()
    p["keys"] = p["keys"] * 1e3
    found = cpu.cell_weights(**p)
    assert found.isfinite().all()
    torch.testing.assert_close(found.double(), expected_weights(p), rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("name", ["keys", "q"])
def test_what_it_cannot_do_is_told(name):
    p = problem()
    assert not cpu.can_weigh(p["q"][..., :24], p["keys"][..., :24], None)
    assert not cpu.can_weigh(p["q"], p["keys"].bfloat16(), None)
    assert not cpu.can_weigh(p["q"], p["keys"][:, :4], None)


def rows(ranges, b, h) -> list[int]:
    starts, lengths = (t[b, h].tolist() for t in ranges)
    return sorted(r for a, n in zip(starts, lengths, strict=True) for r in range(a, a + n))


bounds = st.fixed_dictionaries(
    {
        "nprobe": st.none() | st.integers(1, 12),
        "max_tokens": st.none() | st.integers(0, 60),
        "top_p": st.none() | st.floats(0.01, 1.0),
        "min_score": st.none() | st.floats(-1.0, 2.0),
    }
).filter(lambda given: any(bound is not None for bound in given.values()))


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(12, 300),
    largest=st.integers(1, 9),
    signed=st.booleans(),
    per_row=st.booleans(),
    bounds=bounds,
)
def test_selection_visits_the_rows_that_sorting_would(seed, n, largest, signed, per_row, bounds):
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(0, largest + 1, (2, 2, n), generator=generator, dtype=torch.int32)
    scores = torch.randn(2, 4, n, generator=generator)
    scores = scores if signed else scores.exp()
    offsets = offsets_of(sizes)
    options = bounds | {"per_row": per_row, "first_row": 3}
    found = cpu.bucket_ranges(scores, offsets, **options)
    expected = bucket_ranges(scores, offsets, **options)
    for b in range(2):
        for h in range(4):
            assert rows(found, b, h) == rows(expected, b, h)


def test_equal_scores_are_taken_from_the_first_on_and_touching_lists_join():
    offsets = offsets_of(torch.full((1, 1, 10), 4, dtype=torch.int32))
    starts, lengths = cpu.bucket_ranges(torch.ones(1, 1, 10), offsets, max_tokens=10)
    assert starts.tolist() == [[[0, 10]]]
    assert lengths.tolist() == [[[8, 2]]]  # the last one is cut to its newest rows
    for bound in ({"nprobe": 2}, {"top_p": 0.2}):
        starts, lengths = cpu.bucket_ranges(torch.ones(1, 1, 10), offsets, **bound)
        assert (starts.tolist(), lengths.tolist()) == ([[[0]]], [[[8]]])


def test_ranges_are_written_where_asked():
    offsets = offsets_of(torch.full((1, 2, 6), 2, dtype=torch.int32))
    scores = torch.arange(24.0).view(1, 4, 6)
    own = torch.full((2, 1, 4, 7), -1, dtype=torch.int32)
    starts, _ = cpu.bucket_ranges(
        scores, offsets, nprobe=3, max_tokens=5, out=(own[0, ..., 2:], own[1, ..., 2:])
    )
    assert starts.data_ptr() == own[0, ..., 2:].data_ptr()
    assert (own[..., :2] == -1).all()
    assert own[1, ..., 2:].sum(-1).tolist() == [[5] * 4]


def test_results_do_not_depend_on_the_number_of_threads():
    p, threads = problem(batch=1), torch.get_num_threads()
    try:
        found = []
        for n in (1, threads):
            torch.set_num_threads(n)
            found.append(cpu.cell_weights(**p))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)
