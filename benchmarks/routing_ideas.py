"""Ideas for routing that are not in the library, against what is: a table of `docs/partitions.md`.

    python -m benchmarks.routing_ideas --index FILE [--texts 6]

Same model, texts, queries and rows as `benchmarks.routing`; lists are taken whole here, so figures
differ in the last digit. Raw figures go to `$OUT`, else to
`benchmarks/results/<device>/routing_ideas.json` and from there into the page.
"""

import argparse
import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from saap import hf
from saap.budget import Budget
from saap.eval import reference
from saap.eval.tasks.attention import LayerProblem, layout_of
from saap.index.lists import sizes_of
from saap.kernels.routing.reference import turned_scores
from saap.routing import LayerRouting
from saap.selector import LayerInfo
from saap.trained_index import TrainedIndex

from .cpu import cpu_name, environment
from .reports import put_table, report_path, write
from .routing import CONTEXT, N_QUERIES, N_SINK, PAGE, held_out_texts, training_texts

SHARE = 0.05
N_BEFORE = 32  # queries before those that are judged
N_FITTED = 6  # training texts that exponents are fitted on
FIT_STEPS = 150


@dataclass
class Case:
    """A layer of a text: n queries, G query heads per KV head, cells and M rows of the middle."""

    layer: int
    logits: Tensor  # of the network [n, Hkv, G, nlist + 1]
    turned: Tensor  # expected scores [n, Hkv, G, cells]
    sizes: Tensor  # [Hkv, cells]
    cell: Tensor  # of each row [Hkv, M]
    weights: Tensor  # true attention [n, Hkv, G, M]
    recent: Tensor  # true attention of the 32 queries before, summed [Hkv, M]
    values: Tensor  # [Hkv, M, D]
    local: Tensor  # attention of sinks and tail [n, Hkv, G]
    local_out: Tensor  # and what it adds to the output [n, Hkv, G, D]
    exact: Tensor  # output [n, Hkv, G, D]
    q: Tensor  # de-RoPEd [n, Hq, D]

    @property
    def cell_mass(self) -> Tensor:
        index = self.cell[:, None].expand(self.weights.shape)
        return torch.zeros_like(self.turned).scatter_add_(-1, index, self.weights)


def cases_of(model, tokens: Tensor, index: TrainedIndex) -> list[Case]:
    """One for each layer of a text."""
    read = hf.read_context(model, tokens, n_queries=N_BEFORE + N_QUERIES)
    return [case_of(read, layer.info, index) for layer in hf.model_layers(model) if layer.is_full]


def case_of(read: hf.ReadContext, info: LayerInfo, index: TrainedIndex) -> Case:
    window = (CONTEXT - N_QUERIES) // 32
    layout = layout_of(Budget(max_tokens=0, n_sink=N_SINK, window=window, flush_every=1))
    asked = {info.number: tuple(q[N_BEFORE:] for q in read.queries[info.number])}
    problem = LayerProblem(dataclasses.replace(read, queries=asked), info, layout)
    routing = LayerRouting.of(index.layers[info.number], "mlp")
    middle = slice(problem.first, problem.stop)
    n_kv, n_middle = problem.n_kv, problem.stop - problem.first
    keys = problem.k_rope[0, :, middle]
    buckets = routing.assign(problem.k_derope[:, :, middle])
    cell = routing.lists_of(buckets, torch.arange(n_middle), n_middle)[0]
    far = problem.n_context + torch.arange(N_QUERIES) - problem.first
    turned = turned_scores(
        problem.q_derope.float(),
        routing.typical_keys,
        routing.inv_freq,
        torch.full_like(far, n_middle),
        far,
        n_segments=routing.n_segments,
        interleaved=routing.interleaved,
    )
    q = problem.q_rope.unflatten(1, (n_kv, -1))
    lse = problem.exact[1].unflatten(1, (n_kv, -1))
    scores = torch.einsum("nhgd,hmd->nhgm", q, keys) * info.sm_scale
    before = read.queries[info.number][0][:N_BEFORE].unflatten(1, (n_kv, -1))
    context = problem.k_rope[0, :, : problem.n_context]
    recent = torch.einsum("nhgd,hmd->hgnm", before, context) * info.sm_scale
    recent = recent.softmax(-1)[..., middle]
    local_lse = problem.local[1].unflatten(1, (n_kv, -1))
    local = (local_lse - lse).exp()
    return Case(
        info.number,
        routing.router.logits(problem.q_derope).unflatten(1, (n_kv, -1)),
        turned.flatten(-2),
        sizes_of(cell, routing.n_lists),
        cell.long(),
        (scores - lse[..., None]).exp(),
        recent.sum((1, 2)),
        problem.v[0, :, middle],
        local,
        problem.local[0].unflatten(1, (n_kv, -1)) * local[..., None],
        problem.exact[0].unflatten(1, (n_kv, -1)),
        problem.q_derope,
    )


def weight_a_key(case: Case, trained=0.5, turned=0.5, normalised=0.0) -> Tensor:
    """Predicted attention `[n, Hkv, G, cells]`; exponents may be one per head, `[Hkv, G]`.

    With `normalised` 1 every head's weights add up to 1, with 0 to the mass of its middle.
    """
    trained, turned = (torch.as_tensor(t)[..., None].float() for t in (trained, turned))
    logits = case.logits
    nlist = logits.shape[-1] - 1
    segments = case.turned.shape[-1] // nlist
    scores = trained * logits[..., :-1].repeat_interleave(segments, -1) + turned * case.turned
    scores = scores.masked_fill((case.sizes == 0)[:, None], -torch.inf)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    total = (weights * case.sizes[:, None]).sum(-1, keepdim=True)
    in_bucket = case.sizes.unflatten(-1, (nlist, segments)).sum(-1)[:, None].float().log()
    whole = torch.cat([logits[..., :-1] + in_bucket, logits[..., -1:]], -1)
    middle = 1 - whole.softmax(-1)[..., -1:]
    return weights / total * middle ** (1 - normalised)


def chosen_rows(case: Case, per_key: Tensor, n_rows: int) -> Tensor:
    """Whether each row is visited, `[n, Hkv, M]`: the `n_rows` of the best cells."""
    rows = per_key.gather(-1, case.cell.expand(len(per_key), -1, -1))
    best = rows.topk(n_rows, -1).indices
    return torch.zeros_like(rows, dtype=torch.bool).scatter_(-1, best, True)


def rows_of_middle() -> int:
    """Rows that a query visits besides sinks and window."""
    context = CONTEXT - N_QUERIES
    return round(SHARE * context) - N_SINK - context // 32


def usual(case: Case) -> Tensor:
    """What the default visits."""
    return chosen_rows(case, weight_a_key(case).sum(2), rows_of_middle())


def outcome(cases: list[Case], choose: Callable[[Case], Tensor], tail: float = 0.0) -> dict:
    """Recall of the middle, worst head against the oracle, and output error."""
    heads: dict[tuple, Tensor] = {}
    errors = []
    for case in cases:
        visited = choose(case)
        n_rows = int(visited.sum(-1).max())
        perfect = case.weights.sum(2).topk(n_rows, -1).indices
        found = case.weights * visited[:, :, None]
        best = case.weights.gather(-1, perfect[:, :, None].expand(*found.shape[:3], -1))
        sums = torch.stack([found.sum((0, 3)), best.sum((0, 3)), case.weights.sum((0, 3))])
        heads[case.layer] = heads.get(case.layer, 0) + sums
        out = torch.einsum("nhgm,hmd->nhgd", found, case.values) + case.local_out
        out = out / (found.sum(-1) + case.local)[..., None]
        if tail:
            out = with_tail(case, visited, out, tail)
        difference = (out - case.exact).flatten(1).norm(dim=1)
        errors.append(difference / case.exact.flatten(1).norm(dim=1))
    found, best, whole = torch.stack(list(heads.values()), 1).flatten(1)
    looks_far = whole / sum(len(c.weights) for c in cases if c.layer == cases[0].layer) > 0.01
    return {
        "recall_middle": round(float(found.sum() / whole.sum()), 4),
        "worst_head_of_best_rows": round(float((found / best)[looks_far].min()), 4),
        "output_error": round(float(torch.cat(errors).mean()), 4),
    }


def with_tail(case: Case, visited: Tensor, out: Tensor, share: float) -> Tensor:
    """What is not visited counts by the mean value of its bucket, at `share` of its prediction."""
    segments = case.turned.shape[-1] // (case.logits.shape[-1] - 1)
    bucket = case.cell // segments
    nlist, dim = case.logits.shape[-1] - 1, case.values.shape[-1]
    count = torch.zeros(len(bucket), nlist).scatter_add_(1, bucket, torch.ones(bucket.shape))
    sums = torch.zeros(len(bucket), nlist, dim)
    sums.scatter_add_(1, bucket[..., None].expand(-1, -1, dim), case.values)
    means = sums / count.clamp(min=1)[..., None]
    predicted = weight_a_key(case).gather(-1, case.cell[:, None].expand(case.weights.shape))
    missed = torch.zeros(*out.shape[:3], nlist).scatter_add_(
        -1, bucket[:, None].expand(case.weights.shape), predicted * ~visited[:, :, None]
    )
    missed *= share
    estimate = torch.einsum("nhgb,hbd->nhgd", missed, means)
    return (1 - missed.sum(-1, keepdim=True)) * out + estimate


def fitted_exponents(cases: list[Case], n_layers: int) -> list[Tensor]:
    """The two exponents of the blend that predict true masses best, a pair for each head."""
    found = []
    for layer in range(n_layers):
        own = [c for c in cases if c.layer == layer]
        masses = [c.cell_mass for c in own]
        shape = (2, *own[0].logits.shape[1:3])
        with torch.enable_grad():
            exponents = torch.full(shape, 0.5, requires_grad=True)
            optimizer = torch.optim.Adam([exponents], lr=0.05)
            for _ in range(FIT_STEPS):
                loss = 0.0
                for case, mass in zip(own, masses, strict=True):
                    predicted = weight_a_key(case, *exponents, 1.0) * case.sizes[:, None]
                    loss = loss - (mass * predicted.clamp(min=1e-12).log()).sum() / mass.sum()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        found.append(exponents.detach())
    return found


def stored(
    cases: list[Case], index: TrainedIndex, change: Callable[[Tensor], Tensor]
) -> list[Case]:
    """The cases, their networks' second layers changed."""
    made = []
    for case in cases:
        router = copy.copy(index.layers[case.layer].router("mlp"))
        w2 = router.w2 if router.w2_scale is None else router.w2 * router.w2_scale[..., None]
        router.w2, router.w2_scale = change(w2), None
        changed = copy.copy(case)
        changed.logits = router.logits(case.q).unflatten(1, case.logits.shape[1:3])
        made.append(changed)
    return made


def rounded_to(bits: int) -> Callable[[Tensor], Tensor]:
    most = 2 ** (bits - 1) - 1

    def change(w2: Tensor) -> Tensor:
        scale = w2.abs().amax(-1, keepdim=True) / most
        return (w2 / scale).round() * scale

    return change


def of_rank(rank: int) -> Callable[[Tensor], Tensor]:
    def change(w2: Tensor) -> Tensor:
        u, s, v = torch.linalg.svd(w2, full_matrices=False)
        return (u[..., :rank] * s[..., None, :rank]) @ v[..., :rank, :]

    return change


def heavy(case: Case, per_key: Tensor, n_heavy: int, n_rows: int) -> Tensor:
    """Rows that the queries before looked at most are visited always, the rest as usual."""
    rows = per_key.gather(-1, case.cell.expand(len(per_key), -1, -1)).clone()
    rows.scatter_(-1, case.recent.topk(n_heavy, -1).indices.expand(len(rows), -1, -1), torch.inf)
    best = rows.topk(n_rows, -1).indices
    return torch.zeros_like(rows, dtype=torch.bool).scatter_(-1, best, True)


def measure(cases: list[Case], fitting: list[Case], index: TrainedIndex) -> dict[str, dict]:
    n_rows = rows_of_middle()
    found = {"**as it is**": outcome(cases, usual)}
    exponents = fitted_exponents(fitting, len(index.layers))
    found["exponents of the blend fitted, two per head"] = outcome(
        cases, lambda c: chosen_rows(c, weight_a_key(c, *exponents[c.layer]).sum(2), n_rows)
    )
    for part in (0.5, 1.0):
        found[f"heads of a group counted alike, to the power {part:g}"] = outcome(
            cases,
            lambda c, part=part: chosen_rows(c, weight_a_key(c, 0.5, 0.5, part).sum(2), n_rows),
        )
    for n_heavy in (16, 32, 64):
        found[f"{n_heavy} rows that the last 32 queries looked at most"] = outcome(
            cases, lambda c, n=n_heavy: heavy(c, weight_a_key(c).sum(2), n, n_rows)
        )
    for bits in (8, 4):
        found[f"second layer in {bits} bits"] = outcome(
            stored(cases, index, rounded_to(bits)), usual
        )
    for rank in (32, 16, 8):
        found[f"second layer of rank {rank}"] = outcome(stored(cases, index, of_rank(rank)), usual)
    for share in (1.0, 0.5):
        name = "tail estimated by mean values of buckets" + (", by half" if share < 1 else "")
        found[name] = outcome(cases, usual, tail=share)
    return found


def table(found: dict[str, dict]) -> str:
    lines = [
        f"| at {SHARE:.0%} of {CONTEXT:,} tokens | recall of the middle | worst head, of the best "
        "rows | output error |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {r['recall_middle']:.1%} | {r['worst_head_of_best_rows']:.0%} "
        f"| {r['output_error']:.4f} |"
        for name, r in found.items()
    ]
    return "\n".join(lines)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--index", type=Path, required=True)
    parser.add_argument("--texts", type=int, default=6)
    options = parser.parse_args()
    index = TrainedIndex.load(options.index)
    model = hf.load_model(reference.FOLDER)
    cases, fitting = (
        [case for tokens in part for case in cases_of(model, tokens, index)]
        for part in (held_out_texts(options.texts), training_texts()[:N_FITTED])
    )
    found = measure(cases, fitting, index)
    report = {"environment": environment(), "ideas": found}
    write(report_path(cpu_name(), "routing_ideas.json"), report)
    put_table(PAGE, "python -m benchmarks.routing_ideas", table(found))
    print(table(found))


if __name__ == "__main__":
    main()
