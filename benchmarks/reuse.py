"""What a choice of rows is worth to later steps and to other layers.

    python -m benchmarks.reuse [--tokens 8128]     # needs SmolLM2: `make models`

Queries and keys of a text that was read densely. The last tokens each choose 5 % of the rows,
sinks and window counted in, for each KV head: by codes, as `saap` does, whose candidates are those
of the same token or of earlier ones; or the rows that a KV head of a layer before chose for the
same token, with the head that fits best on other tokens. Told is the share of the middle's
attention that is found, over that of the same number of rows by true weights. Figures go to
`$OUT`, else to `benchmarks/results/<device>/reuse.json`, and then into `docs/routing.md`.
"""

import argparse
from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

from saap import hf
from saap.eval.corpora import read_named
from saap.eval.tasks.base import text_tokens
from saap.index.coordinates import Coordinates, balanced
from saap.index.moments import Moments
from saap.kernels.codes import encode, layout
from saap.methods.saap import SaapSearch, as_coded

from .cpu import cpu_name, environment
from .reports import ROOT, put_table, report_path, write

COMMAND = "python -m benchmarks.reuse"
MODEL = "smollm2"
N_SINK, WINDOW, SHARE = 16, 256, 0.05
N_FIRST, N_JUDGED = 16, 32
"""Tokens that only come before, or that heads are matched on; those that are judged."""

AGES, WIDTHS, DISTANCES = (1, 2, 4, 8), (1, 2), (1, 2, 4)
FRESH, TOGETHER = "its own", "the four tokens before, together"


@dataclass
class Layer:
    """Of the last tokens, for the rows between sinks and window."""

    mass: Tensor  # true attention, added over a group's heads [Hkv, tokens, n]
    coarse: Tensor  # scores by coarse codes [Hkv, G, tokens, n]
    whole: Tensor  # by whole codes
    outside: Tensor  # log-sum-exp of the scores with all other rows [Hkv, G, tokens]

    def best(self, t: int, count: int) -> Tensor:
        """Rows by true weights, bool `[Hkv, n]`."""
        return marked(self.mass[:, t].topk(count, -1).indices, self.mass.shape[-1])

    def most(self, t: int, count: int) -> float:
        """Mass of so many rows of each KV head, at most."""
        return float(self.mass[:, t].topk(count, -1).values.sum())

    def candidates(self, t: int, count: int) -> Tensor:
        """Of all heads of a group, bool `[Hkv, n]`."""
        rows = self.coarse[:, :, t].topk(count, -1).indices.flatten(1)
        return marked(rows, self.mass.shape[-1])

    def found(self, t: int, candidates: Tensor, count: int) -> tuple[float, float]:
        """Mass of the best of these rows by whole codes; how many whole codes are read."""
        scores = self.whole[:, :, t].masked_fill(~candidates[:, None], -torch.inf)
        rows = weights_of(scores, self.outside[:, :, t]).topk(count, -1).indices
        return float(self.mass[:, t].gather(-1, rows).sum()), float(candidates.sum(-1).sum())


def marked(rows: Tensor, n: int) -> Tensor:
    return torch.zeros(len(rows), n, dtype=torch.bool).scatter_(1, rows, True)


def vectors_of(context, number: int) -> tuple[Tensor, Tensor]:
    """Queries of the latest tokens, `[Hkv, G, m, D]`, and all keys of a layer."""
    k = context.keys(number)[0][0]
    return context.latest[number][0].unflatten(0, (len(k), -1)), k


def layer_of(context, info, own: Coordinates | None = None) -> Layer:
    """`own`: coordinates of another text; None: of this one."""
    latest, k = vectors_of(context, info.number)
    n, tokens = k.shape[1], N_FIRST + N_JUDGED
    if own is None:
        own = balanced(Moments.of(latest.flatten(1, 2), k))
    own = as_coded(own)
    codes = encode(own.keys(k[None]), own.importance)
    q = latest[:, :, -tokens:]
    middle = slice(N_SINK, n - WINDOW - tokens)
    coded = q @ own.of_queries[0, :, None].mT * info.sm_scale
    coarse, whole = (
        (coded @ decode(codes)[0][:, None].mT)[..., middle]
        for decode in (layout.decode_coarse, layout.decode)
    )
    outside = outside_of(q, k, own, info.sm_scale, middle)
    return Layer(mass_of(q, k, info.sm_scale)[..., middle], coarse, whole, outside)


def mass_of(q: Tensor, k: Tensor, sm_scale: float) -> Tensor:
    """What the last tokens' queries `q [Hkv, G, tokens, D]` give each row, added over a group's
    heads `[Hkv, tokens, n]`."""
    n, tokens = k.shape[1], q.shape[2]
    later = torch.arange(n) > torch.arange(n - tokens, n)[:, None]
    scores = (q @ k[:, None].mT * sm_scale).masked_fill(later, -torch.inf)
    return scores.softmax(-1).sum(1)


def outside_of(q: Tensor, k: Tensor, own: Coordinates, sm_scale: float, middle: slice) -> Tensor:
    """Log-sum-exp `[Hkv, G, tokens]` of the last tokens' scores with rows before and behind the
    middle, without what the mean key adds to all scores, as codes count them."""
    n, tokens = k.shape[1], q.shape[2]
    later = torch.arange(n) > torch.arange(n - tokens, n)[:, None]
    scores = (q @ k[:, None].mT * sm_scale).masked_fill(later, -torch.inf)
    scores[..., middle] = -torch.inf
    return scores.logsumexp(-1) - sm_scale * (q @ own.mean[0, :, None, :, None])[..., 0]


def weights_of(scores: Tensor, outside: Tensor) -> Tensor:
    """The heads' softmax of `scores [Hkv, G, ..., n]` beside what is outside, added up."""
    return (scores - scores.logsumexp(-1).logaddexp(outside)[..., None]).exp().sum(1)


def read(model, tokenizer, corpus: str, n_tokens: int):
    """So many tokens of a text, read densely."""
    tokens = text_tokens(tokenizer, b"\n".join(read_named(corpus)), n_tokens, 0, 1)
    return hf.read_context(model, tokens, chunk=2048)


def full_layers(model) -> list:
    return [place.info for place in hf.model_layers(model) if place.is_full]


def rows_chosen(n_tokens: int) -> int:
    """Rows of the middle that a step visits."""
    return round(SHARE * n_tokens) - N_SINK - WINDOW


def over_time(layer: Layer, count: int, sums: dict) -> None:
    search = SaapSearch()
    for t in range(N_FIRST, N_FIRST + N_JUDGED):
        best = layer.most(t, count)
        usual = search.candidates(count, layer.mass.shape[-1])
        ways = {(FRESH, usual): layer.candidates(t, usual)}
        for width in WIDTHS:
            for age in AGES:
                label = f"the token {age} before" if age > 1 else "the token before"
                ways[label, width * usual] = layer.candidates(t - age, width * usual)
        ways[TOGETHER, usual] = sum(layer.candidates(t - age, usual) for age in (1, 2, 3, 4)) > 0
        for way, candidates in ways.items():
            mass, read = layer.found(t, candidates, count)
            add(sums, way, mass, best, read, len(candidates))


def over_layers(layer: Layer, before: list[Layer], count: int, sums: dict) -> None:
    for distance in DISTANCES:
        if distance > len(before):
            continue
        other = before[-distance]
        chosen = torch.stack([other.best(t, count) for t in range(N_FIRST + N_JUDGED)], 1)
        # [Hkv, Hkv of the other layer, tokens]
        mass = (layer.mass[:, None] * chosen).sum(-1)
        head = mass[:, :, :N_FIRST].sum(-1).argmax(-1)
        own = mass[torch.arange(len(head)), head]
        for t in range(N_FIRST, N_FIRST + N_JUDGED):
            best = layer.most(t, count)
            away = f"{distance} layers before" if distance > 1 else "the layer before"
            add(sums, (f"rows of {away}", 0), float(own[:, t].sum()), best, 0.0, len(head))


def add(sums: dict, way: tuple, mass: float, best: float, read: float, heads: int) -> None:
    for number, value in enumerate((mass, best, read, heads)):
        sums[way][number] += value


def table(records: list[dict]) -> str:
    lines = [
        "| candidates of | for each head | whole codes read | attention found, over the best |",
        "|---|---:|---:|---:|",
    ]
    for r in records:
        count = f"{r['count']:,}" if r["count"] else "–"
        read = f"{r['read']:,.0f}" if r["count"] else "–"
        lines.append(f"| {r['of']} | {count} | {read} | {r['found']:.1%} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8128)
    options = parser.parse_args()
    model, tokenizer = hf.load_model(MODEL), hf.load_tokenizer(MODEL)
    context = read(model, tokenizer, "prose2", options.tokens)
    count = rows_chosen(options.tokens)
    sums: dict = defaultdict(lambda: [0.0] * 4)
    before: list[Layer] = []
    for info in full_layers(model):
        layer = layer_of(context, info)
        over_time(layer, count, sums)
        over_layers(layer, before, count, sums)
        before = [*before, layer][-max(DISTANCES) :]
        print(f"layer {info.number}", flush=True)
    records = [
        {"of": of, "count": n, "found": mass / best, "read": read / heads}
        for (of, n), (mass, best, read, heads) in sums.items()
    ]
    records.sort(key=lambda r: (r["count"] == 0, r["of"] != FRESH, r["count"]))
    report = {"environment": environment(), "tokens": options.tokens, "records": records}
    write(report_path(cpu_name(), "reuse.json"), report)
    put_table(ROOT / "docs" / "routing.md", COMMAND, table(records))
    print(table(records))


if __name__ == "__main__":
    main()
