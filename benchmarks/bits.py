"""How the bits of a key's code are spent: quantizers of coordinates, and what a step reads first.

    python -m benchmarks.bits [--tokens 8128]     # needs SmolLM2: `make models`

Queries and keys of a text that was read densely; the last tokens each choose 5 % of the rows,
sinks and window counted in. Each way has bits and steps for each eighth of the coordinates, and
bits of them that the coarse code has. Told is the attention that is found, over that of the same
number of rows by true weights; and how many choices (a KV head of a layer, at one token) lose more
than a tenth of it. Queries are not rounded here. Each key is rounded at one size and has an exact
scale, but for those of `saap`, which are coded as it does. Figures go to `$OUT`, else to
`benchmarks/results/<device>/bits.json`, and then into `docs/routing.md`.
"""

import argparse
from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

from saap import hf
from saap.index.coordinates import balanced
from saap.index.moments import Moments, Sums
from saap.kernels.codes import encode, layout
from saap.kernels.codes.layout import BITS, SIGN, WHOLE_STEPS

from . import reuse
from .cpu import cpu_name, environment
from .reports import ROOT, put_table, report_path, write

COMMAND = "python -m benchmarks.bits"
N_SINK, WINDOW, SHARE, N_JUDGED = 16, 16, 0.05, 32
LEAST_ERROR = {0: 0.0, 1: 1.596, 2: 0.996, 3: 0.586, 4: 0.335, 5: 0.188}
"""Steps of uniform quantizers with the least error for a normal variable, by their bits."""

FORMER = (4, 4, 4, 4, 2, 2, 2, 2)
SHORT = (5, 4, 4, 3, 2, 2, 0, 0)
OF_9_BYTES, OF_5_BYTES = (2, 2, 1, 1, 1, 1, 0, 0), (2, 1, 1, 0, 0, 0, 0, 0)


@dataclass(frozen=True)
class Way:
    label: str
    bits: tuple[int, ...]
    coarse: tuple[int, ...]
    candidates: int
    narrow: bool = True
    sized: bool = False
    """Coded as `saap` does: each key at the size that serves best."""

    weighed: bool = True
    """Coordinates are for keys that queries look towards, as those of `saap`; else for all."""

    @property
    def steps(self) -> tuple[float, ...]:
        if not self.narrow:
            return tuple(LEAST_ERROR[bits] for bits in self.bits)
        return tuple(
            step if bits else 0.0 for step, bits in zip(WHOLE_STEPS, self.bits, strict=True)
        )

    @property
    def bytes_of(self) -> tuple[int, int]:
        """Of a key of 64 dimensions: the coarse and the whole code, scale included."""
        return sum(self.coarse) + 1, sum(self.bits) + 1


FORMERLY = {"narrow": False, "weighed": False}
OF_SAAP = {"bits": BITS, "coarse": OF_5_BYTES}
WAYS = (
    Way("the former", FORMER, OF_9_BYTES, 512, **FORMERLY),
    Way("the former", FORMER, OF_9_BYTES, 768, **FORMERLY),
    Way("the former bits", FORMER, OF_5_BYTES, 1024, **FORMERLY),
    Way("those of `saap`, wide steps", **OF_SAAP, candidates=1024, **FORMERLY),
    Way("narrow steps", **OF_SAAP, candidates=1024, weighed=False),
    Way("the same without the last quarter", SHORT, OF_5_BYTES, 1024, weighed=False),
    Way("at the best size", **OF_SAAP, candidates=1024, sized=True, weighed=False),
    Way("`saap`: keys weighed", **OF_SAAP, candidates=1024, sized=True),
    Way("`saap`", **OF_SAAP, candidates=512, sized=True),
    Way("`saap`", **OF_SAAP, candidates=768, sized=True),
    Way("`saap`", **OF_SAAP, candidates=10**6, sized=True),
)


def decoded(x: Tensor, importance: Tensor, way: Way) -> tuple[Tensor, Tensor]:
    """What the whole and the coarse codes of keys `x [H, n, P]` stand for."""
    if way.sized:
        codes = encode(x[None], importance[None])
        return layout.decode(codes)[0], layout.decode_coarse(codes)[0]
    weight = importance[:, None]
    length = ((x * x * weight).sum(-1, keepdim=True) / weight.sum(-1, keepdim=True)).sqrt()
    x = x / length
    parts = zip(x.chunk(8, -1), way.bits, way.coarse, way.steps, strict=True)
    whole, coarse = zip(*(levels(*part) for part in parts), strict=True)
    whole, coarse = torch.cat(whole, -1), torch.cat(coarse, -1)
    match = (x * whole * weight).sum(-1, keepdim=True)
    scale = length * (x * x * weight).sum(-1, keepdim=True) / match
    return whole * scale, coarse * scale


def levels(x: Tensor, bits: int, upper: int, step: float) -> tuple[Tensor, Tensor]:
    """What codes of so many bits stand for, and their upper bits alone."""
    if not bits:
        return torch.zeros_like(x), torch.zeros_like(x)
    most = 2**bits - 1
    level = (x / step + most / 2).round().clamp(0, most)
    coarse = torch.zeros_like(x)
    if upper == 1:
        coarse = (2 * (2 * level > most) - 1) * SIGN
    elif upper:
        of = 2 ** (bits - upper)
        coarse = ((level / of).floor() - (2**upper - 1) / 2) * of * step
    return (level - most / 2) * step, coarse


def measure(context, layers: list, count: int) -> dict[int, list[float]]:
    """By number of the way: attention found and the most, whole codes read, choices that lose more
    than a tenth, choices."""
    sums = defaultdict(lambda: [0.0] * 5)
    for info in layers:
        latest, k = reuse.vectors_of(context, info.number)
        n = k.shape[1]
        q, middle = latest[:, :, -N_JUDGED:], slice(N_SINK, n - WINDOW - N_JUDGED)
        learned = {
            True: balanced(Moments.of(latest.flatten(1, 2), k)),
            False: balanced(Moments.of_sums(Sums.of(latest.flatten(1, 2)), Sums.of(k))),
        }
        mass = reuse.mass_of(q, k, info.sm_scale)[..., middle]
        best = mass.topk(count, -1).values.sum(-1)
        for number, way in enumerate(WAYS):
            own = learned[way.weighed]
            x, coded = own.keys(k[None])[0], q @ own.of_queries[0, :, None].mT * info.sm_scale
            outside = reuse.outside_of(q, k, own, info.sm_scale, middle)
            whole, coarse = (
                (coded @ t[:, None].mT)[..., middle] for t in decoded(x, own.importance[0], way)
            )
            rows = coarse.topk(min(way.candidates, coarse.shape[-1]), -1).indices
            read = torch.zeros_like(coarse, dtype=torch.bool).scatter_(-1, rows, True).any(1)
            weights = reuse.weights_of(whole.masked_fill(~read[:, None], -torch.inf), outside)
            found = mass.gather(-1, weights.topk(count, -1).indices).sum(-1)
            new = (found, best, read.sum(-1), found < 0.9 * best, torch.ones_like(found))
            sums[number] = [a + float(b.sum()) for a, b in zip(sums[number], new, strict=True)]
        print(f"layer {info.number}", flush=True)
    return sums


def table(records: list[dict]) -> str:
    lines = [
        "| bits | bytes of a code | read of every row | candidates of a head | whole codes read | "
        "attention found, over the best | choices that lose a tenth |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for r in records:
        candidates = "all" if r["candidates"] >= 10**6 else f"{r['candidates']:,}"
        lines.append(
            f"| {r['label']} | {r['whole_bytes']} | {r['coarse_bytes']} | {candidates} | "
            f"{r['read']:,.0f} | {r['found']:.2%} | {r['lost']:.1%} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8128)
    options = parser.parse_args()
    model, tokenizer = hf.load_model(reuse.MODEL), hf.load_tokenizer(reuse.MODEL)
    context = reuse.read(model, tokenizer, "prose2", options.tokens)
    count = round(SHARE * options.tokens) - N_SINK - WINDOW
    sums = measure(context, reuse.full_layers(model), count)
    records = []
    for number, way in enumerate(WAYS):
        found, best, read, lost, choices = sums[number]
        coarse, whole = way.bytes_of
        records.append(
            {"label": way.label, "bits": way.bits, "steps": way.steps, "whole_bytes": whole,
             "coarse_bytes": coarse, "candidates": way.candidates, "read": read / choices,
             "found": found / best, "lost": lost / choices}
        )  # fmt: skip
    report = {"environment": environment(), "tokens": options.tokens, "records": records}
    write(report_path(cpu_name(), "bits.json"), report)
    put_table(ROOT / "docs" / "routing.md", COMMAND, table(records))


if __name__ == "__main__":
    main()
