"""Choice of rows by coded keys on a GPU: a kernel scores codes, torch's operators choose.

Shapes depend on arguments alone and nothing waits for the GPU, so a step can be captured in a
CUDA graph. Of rows with equal weights any come first. On CPU tensors it runs in Triton's
interpreter, if `TRITON_INTERPRET=1` was set before triton was imported.
"""

import contextlib
import functools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from saap.kernels.backends.graphs import Replayed

from .layout import CODED, Codes
from .reference import in_bytes
from .triton_kernels import score_codes

INTERPRETED = not isinstance(score_codes, triton.JITFunction)
BLOCK, MOST_HEADS = 64, 128
_NONE = torch.iinfo(torch.int32).max


class Launch(NamedTuple):
    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, int]


def limit(q: Tensor, codes: Codes, out: tuple[Tensor, Tensor]) -> str | None:
    """What of validated arguments this backend cannot do, or None."""
    if q.device.type != "cuda" and not INTERPRETED:
        return (
            f"q must be on a CUDA device for impl 'triton'; got {q.device}: use one, or set "
            "TRITON_INTERPRET=1 before triton is imported"
        )
    return codes.misplaced(q.device)


class Prepared:
    """A choice of rows by the same codes as often as it is called, whatever these hold then.

    shape: of the queries that calls have. The first of them says whether there is an `outside`.
    """

    def __init__(
        self, shape: tuple[int, ...], codes: Codes, n_rows: list[int], *, max_tokens: int,
        n_candidates: int, min_weight: float | None, first_row: int,
        out: tuple[Tensor, Tensor], scored: Tensor,
    ):  # fmt: skip
        self.a = torch.empty(shape, device=scored.device)
        self.outside: Tensor | None = None
        self.about = codes, n_rows
        self.options = {
            "max_tokens": max_tokens, "n_candidates": n_candidates, "min_weight": min_weight,
            "first_row": first_row, "out": out, "scored": scored,
        }  # fmt: skip
        self.run = Replayed(self._choose) if self.a.is_cuda else self._choose

    def _choose(self) -> None:
        select_rows(self.a, *self.about, outside=self.outside, **self.options)

    def __call__(self, q: Tensor, outside: Tensor | None) -> None:
        """q: `[n, Hq, P]` float32; outside: `[n, Hq]`."""
        if outside is not None and self.outside is None:
            self.outside = torch.empty_like(outside, memory_format=torch.contiguous_format)
        with torch.cuda.device_of(q) if q.is_cuda else contextlib.nullcontext():
            self.a.view(q.shape).copy_(q)
            if outside is not None:
                self.outside.copy_(outside)
            self.run()


def select_rows(
    a: Tensor, codes: Codes, n_rows: list[int], *, max_tokens: int, n_candidates: int,
    min_weight: float | None, outside: Tensor | None, first_row: int,
    out: tuple[Tensor, Tensor], scored: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`a [n, H, G, P]`: scaled queries of the G heads that share each of the H selections."""
    n, heads, group, _ = a.shape
    if group > MOST_HEADS:
        raise ValueError(f"at most {MOST_HEADS} query heads can share a selection; got {group}")
    most = max(n_rows)
    if outside is not None:
        outside = outside.reshape(n * heads, group, 1)
    counts = _counts(tuple(n_rows), a.device)
    of_task = counts.repeat_interleave(heads) if len(n_rows) > 1 else counts.expand(n * heads)
    if n_candidates >= most:
        weights = _softmax(_scores(a, codes, counts, most, None), outside)
        rows = torch.arange(most, dtype=torch.int32, device=a.device).expand(n * heads, -1)
        inside = rows < of_task[:, None]
        scored.copy_(of_task.view(n, heads))
    else:
        coarse = _scores(a, codes, counts, most, None, whole=False)
        rows = coarse.topk(n_candidates, -1, sorted=False).indices.flatten(1).sort(-1).values
        again = torch.zeros_like(rows, dtype=torch.bool)
        again[:, 1:] = rows[:, 1:] == rows[:, :-1]
        inside = ~again & (rows < of_task[:, None])
        rows = torch.where(inside, rows, -1).int()
        weights = _softmax(_scores(a, codes, counts, rows.shape[1], rows), outside)
        scored.copy_(inside.sum(-1).view(n, heads))
    # Weights are not below 0: what is no row comes after all of them.
    weights = torch.where(inside, weights, -1.0)
    best = weights.topk(min(max_tokens, most), -1, sorted=False)
    least = 0.0 if min_weight is None else min_weight
    chosen = torch.where(best.values >= least, rows.gather(-1, best.indices), _NONE)
    return _ranges(chosen.sort(-1).values, first_row, out)


@functools.lru_cache(maxsize=256)
def _counts(n_rows: tuple[int, ...], device: torch.device) -> Tensor:
    """Kept, since a layer has as many rows as the one before it, and a copy cannot be captured."""
    return torch.tensor(n_rows, dtype=torch.int32, device=device)


def _softmax(scores: Tensor, outside: Tensor | None) -> Tensor:
    """Added over the heads `[tasks, G, n]`, beside `outside [tasks, G, 1]`; 0 for a sequence
    without rows."""
    if outside is not None:
        outside = outside.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        scores = torch.cat([scores, outside], -1)
    weights = scores.softmax(-1).nan_to_num(nan=0.0).sum(1)
    return weights if outside is None else weights[:, :-1]


def _scores(a, codes, counts, n_listed, listed, *, whole=True) -> Tensor:
    """float32 `[tasks, G, n_listed]`."""
    n, heads, group, coordinates = a.shape
    tasks, width = n * heads, max(16, triton.next_power_of_2(group))
    weights, offset, factor = in_bytes(a.flatten(0, 1).float(), whole=whole)
    padded = a.new_zeros(tasks, coordinates, width, dtype=torch.float16)
    padded[..., :group] = weights.mT
    offsets, factors = a.new_zeros(2, tasks, width, dtype=torch.float32)
    offsets[:, :group], factors[:, :group] = offset, factor
    out = torch.empty(tasks, group, n_listed, device=a.device)
    launch = launch_of(
        padded, offsets, factors, codes, counts, listed, out, heads=heads, whole=whole
    )
    launch.kernel[launch.grid](**launch.arguments, **launch.options)
    return out


def launch_of(weights, offsets, factors, codes, counts, listed, out, *, heads, whole) -> Launch:
    """How the rows that `listed` names, or all, are scored; see `score_codes`."""
    tasks, group, n_listed = out.shape
    coarse, fine, scale = codes.coarse, codes.fine, codes.scale
    arguments = {
        "weights": weights, "offsets": offsets, "factors": factors, "coarse": coarse,
        "fine": fine, "scale": scale, "counts": counts,
        "listed": counts if listed is None else listed, "out": out, "heads": heads,
        "kv_heads": scale.shape[1], "by_sequence": int(len(counts) > 1), "n_listed": n_listed,
        "group": group, "coarse_batch": coarse.stride(0), "coarse_head": coarse.stride(1),
        "coarse_plane": coarse.stride(2), "fine_batch": fine.stride(0),
        "fine_head": fine.stride(1), "scale_batch": scale.stride(0),
        "scale_head": scale.stride(1), "N_WORDS": codes.coordinates // CODED, "WHOLE": whole,
        "LISTED": listed is not None, "BLOCK": BLOCK, "HEADS": weights.shape[2],
    }  # fmt: skip
    grid = (triton.cdiv(n_listed, BLOCK), tasks)
    return Launch(score_codes, grid, arguments, {"num_warps": 4})


def _ranges(rows: Tensor, first_row: int, out: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Ascending rows `[tasks, k]`, `_NONE` for none at the end, as runs."""
    starts, lengths = out
    tasks, k = rows.shape
    used = rows != _NONE
    begins = used.clone()
    begins[:, 1:] &= rows[:, 1:] != rows[:, :-1] + 1
    run = begins.cumsum(-1) - 1
    # One place more than there are runs takes what does not count.
    first, length = rows.new_zeros(2, tasks, k + 1)
    first.scatter_(-1, torch.where(begins, run, k), rows + first_row)
    length.scatter_add_(-1, torch.where(used, run, k), torch.ones_like(rows))
    shape = starts.shape[:2]
    starts[..., :k], lengths[..., :k] = first[:, :k].view(*shape, k), length[:, :k].view(*shape, k)
    starts[..., k:], lengths[..., k:] = 0, 0
    return starts[..., :k], lengths[..., :k]
