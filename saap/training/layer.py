"""One layer, from the hidden states before it to its partition, routers and measured recall."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from saap.hf.layerwise import LayerStream
from saap.index import fitting, kmeans
from saap.index.coordinates import balanced
from saap.index.routers import Router
from saap.trained_index import LayerIndex

from .capture import DenseAttention, KeySampler, MassRecorder, SampledKeys, Targets
from .hidden import HiddenStates
from .options import TrainingOptions
from .plan import Plan

RECALL_SHARE = 16  # the recorded recall visits nlist / 16 buckets
Report = Callable[[str, float], None]
"""`report(stage, share)`: what a layer is at, and the share of its work that is done."""
KEYS_DONE, KMEANS_DONE, MASSES_DONE = 0.05, 0.15, 0.7  # of a layer's time, roughly


@dataclass(frozen=True)
class FinishedLayer:
    """`recall`: middle mass and recall a query head of each router, on held-out sequences."""

    index: LayerIndex
    recall: dict[str, list[float]]


def train_layer(
    stream: LayerStream,
    layer: int,
    plan: Plan,
    hidden: HiddenStates,
    options: TrainingOptions,
    report: Report,
    *,
    output_needed: bool,
) -> FinishedLayer:
    """Partition and routers of `layer`; puts its outputs into `hidden` where they are needed.

    The layer runs twice: up to its keys on the sequences that are clustered, then through on all.
    Raises ValueError or FloatingPointError, naming the layer, for keys or losses that are not
    finite.
    """
    try:
        sampled = sample_keys(stream, layer, plan, hidden, options, report)
        centroids, centroids_rope = cluster(sampled, options)
        key_scale = kmeans.mean_products(torch.cat(sampled.derope, 1), centroids)
        sampled.derope.clear()
        report("masses", KMEANS_DONE)
        fitted, held = record_masses(
            stream, layer, plan, hidden, options, centroids, report, output_needed=output_needed
        )
        routers = fit_routers(fitted, options, report)
    except (ValueError, FloatingPointError) as error:
        raise type(error)(f"layer {layer}: {error}") from error
    index = LayerIndex(
        centroids,
        routers,
        centroids_rope,
        options.n_segments,
        key_scale,
        sampled.inv_freq,
        sampled.interleaved,
        sampled.sm_scale,
        balanced(sampled.moments.moments()),
    )
    return FinishedLayer(index, held_out_recall(index, held))


def pass_through(
    stream: LayerStream, layer: int, plan: Plan, hidden: HiddenStates, report: Report
) -> None:
    """Run a layer that somebody else trains, for its outputs."""
    for number, tokens in enumerate(plan.sequences):
        report("forward", number / len(plan.sequences))
        handler = DenseAttention(len(tokens))
        hidden.put(number, stream.run(layer, tokens, hidden.get(number), handler))


def sample_keys(stream, layer, plan, hidden, options, report) -> SampledKeys:
    sampled = SampledKeys()
    for done, (number, picked) in enumerate(plan.key_picks.items()):
        report("keys", KEYS_DONE * done / len(plan.key_picks))
        handler = KeySampler(picked, sampled, with_rope=options.baselines)
        stream.run(layer, plan.sequences[number], hidden.get(number), handler)
    report("k-means", KEYS_DONE)
    return sampled


def cluster(sampled: SampledKeys, options: TrainingOptions) -> tuple[Tensor, Tensor | None]:
    """Centroids `[Hkv, nlist, D]` of keys without RoPE, and with it where they were kept."""
    keys = torch.cat(sampled.derope, 1)
    centroids = kmeans.train_centroids(keys, options.nlist, seed=options.seed)
    if not sampled.rope:
        return centroids, None
    keys = torch.cat(sampled.rope, 1)
    sampled.rope.clear()
    return centroids, kmeans.train_centroids(keys, options.nlist, seed=options.seed)


def record_masses(
    stream, layer, plan, hidden, options, centroids, report, *, output_needed
) -> tuple[Targets, Targets]:
    """What the queries of fitted and of held-out sequences look at."""
    fitted, held = (Targets(plan.n_queries(part)) for part in (plan.fitted, plan.held))
    for number, tokens in enumerate(plan.sequences):
        done = number / len(plan.sequences)
        report("masses", KMEANS_DONE + (MASSES_DONE - KMEANS_DONE) * done)
        recorder = MassRecorder(
            len(tokens),
            centroids,
            plan,
            held if number in plan.held else fitted,
            n_sink=options.n_sink,
            window=options.window,
            output_needed=output_needed,
        )
        output = stream.run(layer, tokens, hidden.get(number), recorder)
        if output_needed:
            hidden.put(number, output)
    return fitted, held


def fit_routers(targets: Targets, options: TrainingOptions, report: Report) -> dict[str, Router]:
    """The routers that `options` asks for, all heads of the layer together."""
    report("routers", MASSES_DONE)
    routers: dict[str, Router] = {}
    for name in options.fitted_routers:
        if name == "linear":
            routers[name] = fitting.fit_linear(targets.q, targets.mass)
            continue
        network = fitting.fit_mlp(
            targets.q,
            targets.mass,
            targets.sizes,
            targets.block_of,
            hidden=options.hidden,
            steps=options.steps,
            seed=options.seed,
            progress=lambda done, total, loss: report(
                f"routers, loss {loss:.3f}", MASSES_DONE + (1 - MASSES_DONE) * done / total
            ),
        )
        routers[name] = network.quantized()
    return routers


def recall_nprobe(nlist: int) -> int:
    """Buckets that the recorded recall visits."""
    return max(1, nlist // RECALL_SHARE)


def held_out_recall(index: LayerIndex, held: Targets, chunk: int = 1024) -> dict:
    """Middle recall a query head of each router at `nlist / 16` whole buckets, the oracle's, and
    the mean attention mass of the middle."""
    nprobe = recall_nprobe(index.nlist)
    names = ("centroid", *index.routers)
    caught = {name: 0.0 for name in ("middle_mass", "oracle", *names)}
    for start in range(0, held.n, chunk):
        part = slice(start, start + chunk)
        q, middle = held.q[:, part], held.mass[:, part, :-1].float()
        seen = held.sizes[:, held.block_of[part]].transpose(0, 1)
        caught["middle_mass"] += middle.sum((-1, -2))
        caught["oracle"] += middle.topk(nprobe, -1).values.sum((-1, -2))
        for name in names:
            scores = index.router(name).mass(q.transpose(0, 1), seen).transpose(0, 1)
            best = scores.topk(nprobe, -1).indices
            caught[name] += middle.gather(-1, best).sum((-1, -2))
    total = caught.pop("middle_mass")
    shares = {"middle_mass": total / held.n}
    shares |= {name: value / total.clamp(min=1e-9) for name, value in caught.items()}
    return {name: [round(x, 4) for x in value.tolist()] for name, value in shares.items()}
