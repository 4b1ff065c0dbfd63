"""Cells, turned queries, and the routing that scores cells by them."""

import subprocess
import sys

import pytest
import torch

from saap.index import cells, fitting
from saap.index.lists import invert
from saap.index.routers import CentroidRouter, MLPRouter
from saap.kernels.routing.reference import rotated_to_age, segment_ages
from saap.rope import VARIANTS, frequencies
from saap.routing import LayerRouting

from .test_index import synthetic_masses

NLIST, HKV, G, D = 6, 2, 2, 16
FREQ = 100.0 ** (-torch.arange(0, D, 2) / D)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_rows_of_a_bucket_stay_together_and_in_time_order():
    buckets = torch.randint(0, 5, (1, 2, 203), generator=torch.Generator().manual_seed(0))
    place = torch.arange(203)
    by_cell = invert(cells.cells_of(buckets, place, 203, 4), 20)
    assert torch.equal(by_cell.order, invert(buckets, 5).order)
    assert torch.equal(by_cell.sizes.unflatten(-1, (5, 4)).sum(-1), invert(buckets, 5).sizes)


def test_segments_hold_equally_many_keys_around_their_centers():
    segments = cells.segments_of(torch.arange(203), 203, 4)
    assert segments.bincount().tolist() == [51, 51, 51, 50]
    ages, widths = segment_ages(torch.tensor([203, 40]), torch.tensor([300, 60]), 4)
    for number in range(4):
        mean = (segments == number).nonzero().float().mean()
        assert ages[0, number] == pytest.approx(300 - float(mean), abs=1.0)
    assert ages.shape == (2, 4)
    assert widths.tolist() == [203 / 4, 10]


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary", [D, D // 2])
def test_turned_queries_give_the_mean_score(interleaved, rotary):
    """Against the mean over ages of what RoPE on both sides gives, with the rotation of the other
    module: minus the angle is taking RoPE off."""
    freq = FREQ[: rotary // 2].clone()
    freq[-1] = 0.0  # a pair that does not turn
    derope = VARIANTS["interleaved" if interleaved else "half"]
    q, k = random(1, HKV * G, D), random(1, HKV * G, D, seed=1)

    def rotated(x, position):
        angle = -position * freq
        angle = angle.repeat_interleave(2) if interleaved else torch.cat([angle, angle])
        return derope(x[:, :, None], angle.cos()[None, None], angle.sin()[None, None])[:, :, 0]

    ages = torch.arange(40, 57)  # 17 ages around 48
    scores = [(rotated(q, 100.0) * rotated(k, 100.0 - a)).sum(-1) for a in ages.tolist()]
    expected = torch.stack(scores).mean(0)
    age, width = torch.tensor([[48.0]]), torch.tensor([17.0])
    turn = rotated_to_age(q, age, width, freq, interleaved=interleaved)
    assert turn.shape == (1, HKV * G, 1, D)
    assert ((turn[:, :, 0] * k).sum(-1) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("first", [0, 5000])
def test_frequencies_are_read_from_the_tables(variant, first):
    angle = torch.arange(first, first + 3, dtype=torch.float64)[:, None] * FREQ.double()
    if variant == "interleaved":
        angle = angle.repeat_interleave(2, -1)
    elif variant != "half-width":
        angle = torch.cat([angle, angle], -1)
    scaled = 1.1  # as yarn scales its tables
    cos, sin = (scaled * f(angle)[None].float() for f in (torch.cos, torch.sin))
    assert torch.allclose(frequencies(variant, cos, sin), FREQ, atol=1e-6)


def routing(router="centroid", n_segments=4):
    centroids = torch.nn.functional.normalize(random(HKV, NLIST, D), dim=-1)
    if router == "centroid":
        made = CentroidRouter(centroids)
    else:
        heads, hidden = HKV * G, 8
        made = MLPRouter(
            torch.zeros(heads, D), torch.ones(heads, D), random(heads, hidden, D),
            torch.zeros(heads, hidden), random(heads, NLIST + 1, hidden, seed=3),
            torch.zeros(heads, NLIST + 1),
        )  # fmt: skip
    scale = torch.full((HKV, NLIST), 3.0)
    return LayerRouting(centroids, made, n_segments, scale, FREQ, False, D**-0.5)


def test_keys_that_are_centroids_are_found_exactly():
    """With one key a segment, turned centroids are the keys: the scores are the attention."""
    own, n, distance = routing(n_segments=12), 12, 30
    buckets = torch.randint(0, NLIST, (1, HKV, n), generator=torch.Generator().manual_seed(5))
    lists = own.lists_of(buckets, torch.arange(n), n)
    sizes = invert(lists, own.n_lists).sizes
    q = random(1, HKV * G, D, seed=7)
    mass = own.scores(q, sizes, n, distance, share="head", per_row=False)
    keys = 3.0 * own.centroids.gather(1, buckets[0, ..., None].expand(-1, -1, D))
    for head in range(HKV * G):
        ages = (distance - torch.arange(n)).float()[None]
        turn = rotated_to_age(q, ages, torch.ones(1), FREQ, interleaved=False)[0, head]
        weights = ((turn * keys[head // G]).sum(-1) * D**-0.5).softmax(-1)
        assert (mass[0, head, lists[0, head // G]] - weights).abs().max() < 1e-6


@pytest.mark.parametrize("router", ["centroid", "mlp"])
@pytest.mark.parametrize("share", ["group", "head"])
def test_sequences_of_a_batch_are_scored_as_alone(router, share):
    own = routing(router)
    q = random(3, HKV * G, D)
    generator = torch.Generator().manual_seed(2)
    sizes = torch.randint(0, 5, (3, HKV, own.n_lists), generator=generator, dtype=torch.int32)
    n, distance = torch.tensor([40, 90, 17]), torch.tensor([60, 99, 31])
    together = own.scores(q, sizes, n, distance, share=share)
    for b in range(3):
        alone = own.scores(
            q[b : b + 1], sizes[b : b + 1], int(n[b]), int(distance[b]), share=share
        )
        assert torch.allclose(together[b], alone[0], rtol=1e-5)
    assert together.isfinite().all()
    assert (together[expand(sizes, together) == 0] == 0).all()
    mass = own.scores(q, sizes, n, distance, share=share, per_row=False)
    filled = expand(sizes, mass)
    assert torch.allclose(mass, together * filled, rtol=1e-5)
    per_head = mass.sum(-1) if share == "head" else mass.sum(-1) / G
    assert (per_head <= 1 + 1e-5).all()


def expand(sizes, scores):
    return sizes.repeat_interleave(scores.shape[1] // sizes.shape[1], 1)


def test_an_mlp_router_predicts_weight_a_key():
    """Fitted on buckets of one size, right on buckets of others."""
    q, density = synthetic_masses(n=1500, nlist=8)
    sizes = torch.tensor([[2.0, 4, 8, 16, 2, 4, 8, 16]])
    flipped = sizes.flip(-1)

    def masses(counts):
        weight = torch.cat([density[..., :-1] * counts[:, None], density[..., -1:] * 8], -1)
        return weight / weight.sum(-1, keepdim=True)

    fit, held = slice(0, 1300), slice(1300, None)
    router = fitting.fit_mlp(
        q[:, fit], masses(sizes)[:, fit], sizes[:, None], torch.zeros(1300, dtype=torch.long),
        hidden=48, steps=400, batch=256, lr=4e-3,
    )  # fmt: skip
    truth = masses(flipped)[:, held, :-1]
    predicted = router.mass(q[:, held].transpose(0, 1), flipped[None]).transpose(0, 1)
    ignorant = router.mass(q[:, held].transpose(0, 1), sizes[None]).transpose(0, 1)
    assert (predicted - truth).abs().mean() < 0.25 * (ignorant - truth).abs().mean()


def test_an_empty_cell_far_above_all_others_does_no_harm():
    own = routing()
    far = LayerRouting(
        own.centroids, own.router, own.n_segments, 1e4 * own.key_scale, FREQ, False, D**-0.5
    )
    q = random(1, HKV * G, D)
    sizes = torch.ones(1, HKV, own.n_lists, dtype=torch.int32)
    best = far.scores(q, sizes, 48, 60, per_row=False).argmax(-1)
    sizes.scatter_(-1, best[..., None], 0)
    mass = far.scores(q, sizes, 48, 60, per_row=False)
    assert mass.isfinite().all()
    assert torch.allclose(mass.sum(-1), torch.full((1, HKV), float(G)), rtol=1e-4)


def test_torch_does_it_where_numba_is_not_installed():
    """In a fresh process, with the same lists visited."""
    code = (
        "import sys\n"
        "for name in sys.argv[1:]:\n"
        "    sys.modules[name] = None\n"
        "import torch, saap\n"
        "from saap.kernels.attention import attend_ranges\n"
        "torch.manual_seed(0)\n"
        "keys = torch.randn(1, 2, 1500, 32)\n"
        "routing = saap.partition_keys(keys, 50.0 ** (-torch.arange(16) / 16), sm_scale=0.2)\n"
        "from saap.methods.learned import RoutedSelector\n"
        "budget = saap.Budget(max_tokens=60, window=32, flush_every=8)\n"
        "store = saap.KVStore(RoutedSelector(routing), budget)\n"
        "store.append(keys, keys, keys)\n"
        "store.append(*[keys[:, :, :1]] * 3)\n"
        "impl = 'reference' if sys.argv[1:] else None\n"
        "out, lse = store.attend(*[torch.randn(1, 4, 1, 32)] * 2, impl=impl)\n"
        "print(round(float(lse.sum()), 3), round(store.visited_share, 4))\n"
    )
    said = [
        subprocess.run(
            [sys.executable, "-c", code, *hidden], capture_output=True, text=True, check=True
        ).stdout
        for hidden in ([], ["numba"])
    ]
    assert said[0] == said[1] != ""


def test_a_router_in_8_bits_says_nearly_the_same():
    made = MLPRouter(
        random(HKV * G, D), torch.ones(HKV * G, D), random(HKV * G, 16, D), random(HKV * G, 16),
        random(HKV * G, NLIST + 1, 16) / 4, random(HKV * G, NLIST + 1),
    )  # fmt: skip
    small = made.quantized()
    assert small.w2.dtype == torch.int8
    assert small.w2.abs().amax() == 127
    assert small.tensors().keys() == made.tensors().keys() | {"w2_scale"}
    assert small.nbytes < made.nbytes
    q = random(5, HKV * G, D, seed=8)
    error = (small.logits(q) - made.logits(q)).abs().max()
    assert 0 < error < 0.01 * made.logits(q).abs().max()
    again = MLPRouter(**small.tensors())
    assert torch.equal(again.logits(q), small.logits(q))
