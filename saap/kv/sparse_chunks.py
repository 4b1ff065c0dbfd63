"""Sparse attention of a chunk of new tokens: block by block, over rows that a block chooses.

Queries of neighbouring tokens look at much the same rows, so a block of them chooses once for each
KV head. It is asked by mean queries, of `averaged` neighbouring tokens each: they score all
rows before the block exactly, and the rows with the largest sums of softmax weights are visited.
Rows are chosen one by one: on a real model runs of 64 neighbouring rows hold a quarter of the
weight that single rows do at equal numbers (docs/scale.md), so what block-sparse kernels do
(XAttention, arXiv 2503.16428; some heads of MInference, arXiv 2407.02490) is not done here. Chosen
rows are brought together and attended by the kernel of dense attention.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from saap.kernels.attention.int8_rows import widened
from saap.kernels.attention.merge import merge_states
from saap.prefill import PrefillBudget

from .chunks import OutAndLse, attend_chunk, attend_past

SCORED_TOGETHER = 4  # blocks: products of so few queries alone are slow
SCORED_AT_ONCE = 1024  # rows: products with all of them at once take twice as long


@dataclass
class RowsRead:
    """What forwards of several tokens visited: pairs of a token and a row before or at it.

    `visited` and `seen`, which is what dense attention visits, for each KV head on average.
    """

    visited: int = 0
    seen: int = 0

    @property
    def share(self) -> float:
        return self.visited / self.seen if self.seen else 1.0

    def add(self, length: int, before: int, rows: int | None = None) -> None:
        """`length` tokens that each visited `rows` (None: all) of those before them, and, up to
        themselves, each other."""
        own = length * (length + 1) // 2
        self.visited += own + length * (before if rows is None else rows)
        self.seen += own + length * before


@dataclass(frozen=True)
class _Block:
    """Queries `first` to `last` of a chunk, `before` tokens before them, and what they visit."""

    first: int
    last: int
    before: int
    chosen: int | None  # of the rows between sinks and window; None: everything


def attend_sparse_chunk(
    q: Float[Tensor, "1 Hq T D"],
    k: Shaped[Tensor, "1 Hkv N width"],
    v: Shaped[Tensor, "1 Hkv N width"],
    budget: PrefillBudget,
    *,
    n_sink: int,
    window: int,
    sm_scale: float,
    softcap: float | None = None,
    read: RowsRead | None = None,
) -> OutAndLse:
    """Attention of the last T of N tokens of one sequence, within a budget, causal.

    As `attend_chunk`, but for what each token visits. Blocks begin at multiples of
    `budget.block`, so what a token gives does not depend on how a prompt was cut into chunks of
    whole blocks (but for the `exact_last` of each). Which rows an early token of a block visits
    depends on the later ones of that block. `read` counts.
    """
    n, length = k.shape[2], q.shape[2]
    read = read or RowsRead()
    options = {"sm_scale": sm_scale, "softcap": softcap}
    blocks = list(_blocks(budget, n - length, length, n_sink, window))
    if all(block.chosen is None for block in blocks):
        read.add(length, n - length)
        return attend_chunk(q, k, v, **options)
    out = torch.empty_like(q)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    for panel in _panels(blocks):
        choices = _choose(q, k, panel, budget.averaged, n_sink, window, sm_scale, softcap)
        for block, chosen in zip(panel, choices, strict=True):
            queries, end = slice(block.first, block.last), n - length + block.last
            own = q[:, :, queries]
            if chosen is None:
                read.add(block.last - block.first, block.before)
                found = attend_chunk(own, k[:, :, :end], v[:, :, :end], **options)
            else:
                read.add(block.last - block.first, block.before, chosen.shape[1])
                past = (_brought(t, chosen, q.dtype) for t in (k, v))
                latest = (widened(t[:, :, block.before : end], q.dtype) for t in (k, v))
                found = merge_states(
                    *attend_past(own, *past, **options), *attend_chunk(own, *latest, **options)
                )
            out[:, :, queries], lse[:, :, queries] = found
    return out, lse


def _blocks(budget: PrefillBudget, past: int, length: int, n_sink: int, window: int):
    """The blocks of a chunk; the tokens at its end that visit everything are one of them."""
    sparse = max(0, length - budget.exact_last)
    first = 0
    while first < sparse:
        before = past + first
        last = min(sparse, first + budget.block - before % budget.block)
        always = min(before, n_sink + window)
        chosen = budget.chosen(before, last - first, always)
        if chosen is not None and always + chosen >= before:
            chosen = None
        yield _Block(first, last, before, chosen)
        first = last
    if sparse < length:
        yield _Block(sparse, length, past + sparse, None)


def _panels(blocks: list[_Block]):
    """Blocks that follow one another and choose, some together; each other one by itself."""
    panel: list[_Block] = []
    for block in blocks:
        if panel and (block.chosen is None or len(panel) == SCORED_TOGETHER):
            yield panel
            panel = []
        if block.chosen is None:
            yield [block]
        else:
            panel.append(block)
    if panel:
        yield panel


def _choose(
    q, k, panel: list[_Block], averaged: int, n_sink: int, window: int, sm_scale, softcap
) -> list[Int[Tensor, "Hkv rows"] | None]:
    """For each block the rows before it that it visits, ascending; None for all."""
    if panel[0].chosen is None:
        return [None]
    n_kv = k.shape[1]
    means = [_means(q[0, :, block.first : block.last], n_kv, averaged) for block in panel]
    scores = _scores(torch.cat(means, 1) * sm_scale, k[0, :, : panel[-1].before], softcap)
    stops = torch.tensor([mean.shape[1] for mean in means]).cumsum(0).tolist()
    for block, mean, stop in zip(panel, means, stops, strict=True):
        scores[:, stop - mean.shape[1] : stop, block.before :] = -torch.inf
    shares = torch.softmax(scores, -1, out=scores)  # in place: they are many
    choices = []
    for block, mean, stop in zip(panel, means, stops, strict=True):
        middle = slice(n_sink, block.before - window)
        weights = shares[:, stop - mean.shape[1] : stop, middle].sum(1)
        rows = weights.topk(block.chosen, dim=1, sorted=False).indices.sort(1).values + n_sink
        sinks = torch.arange(n_sink, device=k.device).expand(n_kv, -1)
        latest = torch.arange(block.before - window, block.before, device=k.device)
        choices.append(torch.cat([sinks, rows, latest.expand(n_kv, -1)], 1))
    return choices


def _means(q: Float[Tensor, "Hq T D"], n_kv: int, averaged: int) -> Float[Tensor, "Hkv m D"]:
    """Mean queries of neighbouring tokens of every head, the last of fewer."""
    parts = [part.float().mean(1) for part in q.split(averaged, 1)]
    return torch.stack(parts, 1).unflatten(0, (n_kv, -1)).flatten(1, 2)


def _scores(
    q: Float[Tensor, "Hkv m D"], k: Shaped[Tensor, "Hkv n width"], softcap: float | None
) -> Float[Tensor, "Hkv m n"]:
    out = q.new_empty(*q.shape[:2], k.shape[1])
    for first in range(0, k.shape[1], SCORED_AT_ONCE):
        own = slice(first, first + SCORED_AT_ONCE)
        torch.bmm(q, widened(k[:, own], q.dtype).mT, out=out[:, :, own])
    return out if softcap is None else softcap * torch.tanh(out / softcap)


def _brought(
    t: Shaped[Tensor, "1 Hkv N width"], rows: Int[Tensor, "Hkv R"], dtype: torch.dtype
) -> Float[Tensor, "1 Hkv R D"]:
    """The listed rows of each head, together."""
    own = [head.index_select(0, chosen) for head, chosen in zip(t[0], rows, strict=True)]
    return widened(torch.stack(own)[None], dtype)
