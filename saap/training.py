"""`saap.train`: partitions and routers for every layer and head of a model.

Two passes over the corpus. The first collects de-RoPEd keys and clusters them; the second
computes, inside each layer's attention, the true mass over buckets of a sample of queries. Then
all routers are fitted at once. Memory: one sequence's cache, the sampled keys, and the targets.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from saap.index import cells, fitting, kmeans

from . import hf
from .masses import Masses, attention_masses
from .prefill import DensePrefill, LayerCall
from .trained_index import LayerIndex, TrainedIndex

Progress = Callable[[str, int, int], None]
TRAINABLE = ("cells", "mlp", "linear", "centroid")
N_SEGMENTS = 8
RECALL_SHARE = 16  # the recorded recall visits nlist / 16 buckets


def default_nlist(context: int) -> int:
    """Buckets for a context: the power of two nearest to context / 32, from 16 to 1024.

    1024 from 32k on, as in the paper; about 32 rows a bucket below, so that 5 % of a short context
    is still several buckets.
    """
    return min(1024, max(16, 2 ** round(math.log2(max(context, 1) / 32))))


def default_window(context: int) -> int:
    """The recent window that stays dense: 1/32 of the context, at least 16."""
    return max(16, context // 32)


@dataclass(frozen=True)
class Sampling:
    """How much of the corpus is used: `key_sample` keys a head, from at most `key_sequences`
    sequences, and every `query_stride`-th query of all."""

    n_sink: int
    window: int
    key_sample: int = 65536
    key_sequences: int = 12
    query_stride: int = 8


class KeySampler(DensePrefill):
    """Keeps a fixed random share of the keys of each layer, with and without RoPE."""

    def __init__(self, capacity: int, keep: dict[int, list], picked: Tensor):
        super().__init__(capacity)
        self.keep, self.picked = keep, picked

    def __call__(self, call: LayerCall) -> Tensor:
        out = super().__call__(call)
        first = self.caches[call.layer].length - call.k_rope.shape[2]
        inside = (self.picked >= first) & (self.picked < self.caches[call.layer].length)
        rows = self.picked[inside] - first
        pair = (call.k_derope[0][:, rows], call.k_rope[0][:, rows])
        self.keep.setdefault(call.layer, []).append(pair)
        return out


@dataclass
class Observed:
    """What the queries of one layer looked at; pieces of `[H, n, ...]`, see `masses.Masses`."""

    q: list[Tensor] = field(default_factory=list)
    buckets: list[Tensor] = field(default_factory=list)
    segments: list[Tensor] = field(default_factory=list)
    counts: list[Tensor] = field(default_factory=list)
    block_of: list[Tensor] = field(default_factory=list)

    def add(self, q_derope: Tensor, masses: Masses) -> None:
        n_blocks = sum(c.shape[1] for c in self.counts)
        self.q.append(q_derope[0].float())
        self.buckets.append(masses.buckets[0].half())
        self.segments.append(masses.segments[0].half())
        self.counts.append(masses.counts[0].half())
        self.block_of.append(n_blocks + torch.arange(q_derope.shape[2]) // masses.block)

    def joined(self) -> tuple[Tensor, ...]:
        """`q [Hq, n, D], buckets [Hq, n, nlist + 1], segments [Hq, n, S],
        counts [Hkv, blocks, nlist * S], block_of [n]`."""
        return (
            *(torch.cat(t, 1) for t in (self.q, self.buckets, self.segments, self.counts)),
            torch.cat(self.block_of),
        )


class MassRecorder(DensePrefill):
    """Computes the true masses of sampled queries inside each layer's attention."""

    def __init__(
        self,
        capacity: int,
        centroids: list[Tensor],
        sampling: Sampling,
        ages: Tensor,
        keep: dict[int, Observed],
    ):
        super().__init__(capacity)
        self.centroids, self.sampling, self.ages, self.keep = centroids, sampling, ages, keep

    def __call__(self, call: LayerCall) -> Tensor:
        out = super().__call__(call)
        cache = self.caches[call.layer]
        k_rope, _, k_derope = cache.views()
        centroids = self.centroids[call.layer]
        places = torch.arange(cache.length - call.q_rope.shape[2], cache.length)
        shortest = self.sampling.n_sink + self.sampling.window + centroids.shape[1]
        chosen = places[(places % self.sampling.query_stride == 0) & (places >= shortest)]
        if len(chosen) == 0:
            return out
        rows = chosen - places[0]
        masses = attention_masses(
            call.q_rope[:, :, rows],
            k_rope,
            kmeans.assign(k_derope, centroids),
            chosen.to(k_rope.device),
            centroids.shape[1],
            sm_scale=call.sm_scale,
            n_sink=self.sampling.n_sink,
            window=self.sampling.window,
            ages=self.ages,
            softcap=call.softcap,
        )
        self.keep.setdefault(call.layer, Observed()).add(call.q_derope[:, :, rows], masses)
        return out


def as_sequences(token_ids: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """1-D sequences of int64; ValueError for anything else and for an empty corpus."""
    sequences = list(token_ids)
    if not sequences or any(t.ndim != 1 or t.numel() == 0 for t in sequences):
        shapes = [tuple(t.shape) for t in sequences[:3]]
        raise ValueError(
            f"token_ids has sequences of shape {shapes}: accepted are [n, T] or 1-D ones, "
            "none empty"
        )
    return [t.long() for t in sequences]


@torch.no_grad()
def train(
    model,
    token_ids: Tensor | Sequence[Tensor],
    *,
    nlist: int | None = None,
    router: str = "cells",
    seed: int = 0,
    n_sink: int = 16,
    window: int | None = None,
    n_segments: int = N_SEGMENTS,
    hidden: int = 128,
    steps: int = 400,
    baselines: bool = False,
    progress: Progress | None = None,
) -> TrainedIndex:
    """Partitions and routers for every layer of a Hugging Face model.

    `token_ids`: a LongTensor `[n, T]` or a list of 1-D ones; one in eight sequences is kept back
    to measure the recorded recall. `nlist`: buckets a KV head (`default_nlist` of the longest
    sequence). `router`: the default router of the result, "cells" (`saap.index.cells`, with
    `n_segments` ages a bucket), "mlp" (Saap's own form: whole buckets), "linear" or "centroid".
    `n_sink`, `window`: the tokens that stay dense in use (`default_window`). `hidden`, `steps`:
    width and optimiser steps of the network. `baselines` adds what is only there to be compared
    with: the linear and mlp routers, and centroids of keys with RoPE left on.
    `progress(what, done, total)` is called as work proceeds. The same seed gives the
    same index on the same machine.

    Raises ValueError for a model without RoPE, an empty or too short corpus, or bad options, and
    FloatingPointError when the router's loss is not finite.

    Source: Saap, arXiv 2502.08246.
    """
    if router not in TRAINABLE:
        raise ValueError(f"router={router!r}: accepted are {', '.join(TRAINABLE)}")
    sequences = as_sequences(token_ids)
    longest = max(len(t) for t in sequences)
    if longest > hf.max_context(model):
        raise ValueError(
            f"a sequence has {longest} tokens: accepted are at most the model's "
            f"max_position_embeddings={hf.max_context(model)}"
        )
    nlist = default_nlist(longest) if nlist is None else nlist
    sampling = Sampling(n_sink, default_window(longest) if window is None else window)
    shortest = sampling.n_sink + sampling.window + nlist
    sequences = [t for t in sequences if len(t) > shortest]
    if len(sequences) < 2:
        raise ValueError(
            f"{len(sequences)} sequences are longer than n_sink + window + nlist = {shortest} "
            "tokens: accepted are at least 2; lower nlist or bring more text"
        )
    progress = progress or (lambda what, done, total: None)
    held = max(1, len(sequences) // 8)

    centroids, centroids_rope = _partition(
        model, sequences[held:], nlist, sampling, seed, baselines, progress
    )
    ages = cells.segment_ages(n_segments, sampling.window, longest)
    observed = {}
    for what, part in (
        ("attention mass over buckets", sequences[held:]),
        ("held-out mass", sequences[:held]),
    ):
        kept: dict[int, Observed] = {}
        for number, tokens in enumerate(part):
            recorder = MassRecorder(len(tokens), centroids, sampling, ages, kept)
            hf.run_chunks(model, tokens[None], recorder)
            progress(what, number + 1, len(part))
        observed[what] = [kept[layer].joined() for layer in range(len(centroids))]
    fitted, held_out = observed.values()
    wanted = {router, *(("linear", "mlp") if baselines else ())} - {"centroid"}
    routers = _fit_routers(fitted, ages, sorted(wanted), hidden, steps, seed, progress)
    layers = tuple(
        LayerIndex(centroids[i], routers[i], centroids_rope[i] if baselines else None)
        for i in range(len(centroids))
    )
    index = TrainedIndex(
        layers,
        {
            "model": hf.describe(model),
            "nlist": nlist,
            "router": router,
            "seed": seed,
            "context": longest,
            "n_sink": sampling.n_sink,
            "window": sampling.window,
            "ages": ages.tolist() if router == "cells" else [],
            "corpus": {
                "tokens": sum(len(t) for t in sequences),
                "sha256": hf.fingerprint(torch.cat(sequences)),
            },
        },
    )
    index.metadata["recall"] = held_out_recall(index, held_out)
    return index


def _partition(model, sequences, nlist, sampling, seed, baselines, progress):
    generator = torch.Generator().manual_seed(seed)
    kept: dict[int, list] = {}
    sequences = sequences[:: -(-len(sequences) // sampling.key_sequences)]
    each = max(1, sampling.key_sample // len(sequences))
    for number, tokens in enumerate(sequences):
        middle = torch.arange(sampling.n_sink, len(tokens))
        picked = middle[torch.randperm(len(middle), generator=generator)[:each]].sort().values
        hf.run_chunks(model, tokens[None], KeySampler(len(tokens), kept, picked))
        progress("keys", number + 1, len(sequences))
    centroids, centroids_rope = [], []
    for layer in range(len(kept)):
        derope, rope = (torch.cat(parts, 1) for parts in zip(*kept.pop(layer), strict=True))
        centroids.append(kmeans.train_centroids(derope, nlist, seed=seed))
        if baselines:
            centroids_rope.append(kmeans.train_centroids(rope, nlist, seed=seed))
        progress("k-means", layer + 1, layer + 1 + len(kept))
    return centroids, centroids_rope


def _fit_routers(observed, ages, names, hidden, steps, seed, progress) -> list[dict]:
    """The routers of these names, `[layer][name]`; networks of all layers together."""
    routers: list[dict] = [{} for _ in observed]
    joined = [torch.cat(parts) for parts in zip(*(o[:4] for o in observed), strict=True)]
    q, mass, segments, counts = joined
    options = {"hidden": hidden, "steps": steps, "seed": seed}
    for name in names:
        if name == "linear":
            joint = fitting.fit_linear(q, mass)
        else:
            options["progress"] = lambda done, total, loss, name=name: progress(
                f"router {name} (loss {loss:.3f})", done, total
            )
            with torch.enable_grad():
                if name == "cells":
                    blocks = observed[0][4]
                    joint = fitting.fit_cells(q, mass, segments, counts, blocks, ages, **options)
                else:
                    joint = fitting.fit_mlp(q, mass, **options)
        heads = len(q) // len(observed)
        for layer, found in enumerate(routers):
            own = slice(layer * heads, (layer + 1) * heads)
            parts = {n: (t if n == "ages" else t[own]).clone() for n, t in joint.tensors().items()}
            found[name] = type(joint)(**parts)
    return routers


def held_out_recall(index: TrainedIndex, observed) -> dict:
    """Middle recall of each router at `nlist / 16` whole buckets, `[layer][head]`, and the
    oracle's."""
    nprobe = max(1, index.nlist // RECALL_SHARE)
    found: dict[str, list] = {"nprobe": nprobe, "middle_mass": [], "oracle": []}
    for layer, (q, mass, _, counts, block_of) in zip(index.layers, observed, strict=True):
        middle = mass[..., :-1].float()
        total = middle.sum((-1, -2)).clamp(min=1e-9)
        found["middle_mass"].append((middle.sum(-1).mean(-1)).tolist())
        found["oracle"].append((middle.topk(nprobe, -1).values.sum((-1, -2)) / total).tolist())
        for name in ("centroid", *layer.routers):
            router = layer.router(name)
            sizes = counts[:, block_of].transpose(0, 1).float()
            if router.n_segments == 1:
                sizes = None
            scores = router.mass(q.transpose(0, 1), sizes).transpose(0, 1)
            scores = scores.unflatten(-1, (index.nlist, router.n_segments)).sum(-1)
            best = scores.topk(nprobe, -1).indices
            caught = middle.gather(-1, best).sum((-1, -2)) / total
            found.setdefault(name, []).append(caught.tolist())
    return {
        k: v if isinstance(v, int) else [[round(x, 4) for x in row] for row in v]
        for k, v in found.items()
    }
