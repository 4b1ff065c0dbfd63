"""What choices of rows on a GPU share, as launches: queries in bytes, and the heaviest rows.

Scores become weights, a softmax for each query head, added up over the heads of a task; then the
rows with the largest weights are listed in their order. Nothing waits for the GPU, and shapes do
not depend on values.
"""

from collections.abc import Iterator

import torch
import triton
from torch import Tensor

from saap.kernels.backends.launches import Launch

from . import triton_choice as choice
from .query_map import QueryMap
from .triton_kernels import map_queries, query_bytes

COUNTED = 1024  # rows that a program lists
MAPPED = 16  # coordinates that a program maps a query to
DIGITS = 2048  # numbers of which a program counts a digit
WEIGHTS = 4, 8  # passes over weights, bits of a digit


def mapped_queries(queries: Tensor, query_map: QueryMap, heads: int) -> tuple[Launch, Tensor]:
    """The launch that writes `[tasks * group, P]`, and these. queries: float32 `[tasks * group,
    D]`, contiguous, of so many heads a sequence."""
    _, n_kv, dim, coordinates = query_map.weights.shape
    weights_batch, scale_batch = query_map.strides
    out = torch.empty(len(queries), coordinates, device=queries.device, dtype=torch.float32)
    arguments = {
        "queries": queries, "weights": query_map.weights, "scale": query_map.scale, "out": out,
        "heads": heads, "group": heads // n_kv,
        "weights_batch": weights_batch, "scale_batch": scale_batch,
        "D": dim, "P": coordinates, "ROWS": 32, "BLOCK": MAPPED,
    }  # fmt: skip
    grid = len(queries), coordinates // MAPPED
    return Launch(map_queries, grid, arguments, {"num_warps": 4}), out


def queries_in_bytes(queries: Tensor, tables: Tensor) -> tuple[Launch, dict[str, Tensor]]:
    """The launch that writes `packed, offsets, factors`, each for coarse and whole codes, and
    these; see `query_bytes`. queries: float32 `[heads, P]`, contiguous."""
    heads, coordinates = queries.shape
    device = queries.device
    found = {
        "packed": torch.empty(2, heads, coordinates // 4, dtype=torch.int32, device=device),
        "offsets": torch.empty(2, heads, device=device, dtype=torch.float32),
        "factors": torch.empty(2, heads, device=device, dtype=torch.float32),
    }
    arguments = {
        "queries": queries, "tables": tables, **found, "P": coordinates,
        "WORDS": triton.next_power_of_2(coordinates // 4),
    }  # fmt: skip
    return Launch(query_bytes, (heads,), arguments, {"num_warps": 1}), found


def add_weights(
    scores: Tensor, in_use: Tensor, weights: Tensor, outside: Tensor | None
) -> Iterator[Launch]:
    """Writes `weights [tasks, room]` from `scores [tasks * group, room]`.

    in_use: int32 `[tasks]`, how many of a task count. outside: as in `api.select_rows`.
    """
    (n_heads, room), tasks = scores.shape, len(weights)
    blocks = triton.cdiv(room, COUNTED)
    maxima, sums = torch.empty(2, n_heads, blocks, device=scores.device, dtype=torch.float32)
    summed = {
        "scores": scores, "in_use": in_use, "maxima": maxima, "sums": sums, "room": room,
        "group": n_heads // tasks, "n_blocks": blocks, "BLOCK": COUNTED,
    }  # fmt: skip
    yield Launch(choice.sum_blocks, (blocks, n_heads), summed, {"num_warps": 4})
    beside = maxima if outside is None else outside.contiguous()
    weighed = {
        "outside": beside, "weights": weights, "OUTSIDE": outside is not None,
        "BLOCKS": padded(blocks),
    }  # fmt: skip
    yield Launch(choice.add_weights, (blocks, tasks), summed | weighed, {"num_warps": 4})


def heaviest(
    weights: Tensor, in_use: Tensor, digits: Tensor, rows: Tensor, n_rows: Tensor, *,
    k: int | Tensor, least: float = 0.0, listed: Tensor | None = None,
    scores: Tensor | None = None, left_out: Tensor | None = None,
) -> Iterator[Launch]:  # fmt: skip
    """Writes `rows [tasks, most]`, of each task those with the k largest of its `weights`, which
    are not below `least`; `n_rows [tasks]`: how many.

    k: a number, or int32 `[tasks]`; none is above `most`. digits: int32, so many as
    `digits_of_weights` says, all 0. listed: int32 `[tasks, room]`, the rows that the weights are
    of; None: row i is the i-th. left_out: float32 `[tasks * group]` to write to, if given, the
    log-sum-exp of a head's `scores [tasks * group, room]` with the other rows.
    """
    tasks, room = weights.shape
    blocks = triton.cdiv(room, COUNTED)
    kth = torch.empty(2, tasks, dtype=torch.int32, device=weights.device)
    yield from find_kth(weights, in_use, digits, kth, k, 1, WEIGHTS)
    per_block = torch.empty(2, tasks, blocks, dtype=torch.int32, device=weights.device)
    chosen = {
        "weights": weights, "kth": kth, "in_use": in_use, "per_block": per_block,
        "least": least, "room": room, "n_blocks": blocks, "BLOCK": COUNTED,
    }  # fmt: skip
    yield Launch(choice.count_chosen, (blocks, tasks), chosen, {"num_warps": 8})
    places = {
        "listed": in_use if listed is None else listed, "rows": rows, "n_rows": n_rows,
        "k": rows.shape[1], "LISTED": listed is not None, "BLOCKS": padded(blocks),
    }  # fmt: skip
    yield Launch(choice.list_chosen, (blocks, tasks), chosen | places, {"num_warps": 8})
    if left_out is not None:
        n_heads = len(scores)
        others = {
            "scores": scores, "weights": weights, "kth": kth, "in_use": in_use,
            "left_out": left_out, "least": least, "room": room, "group": n_heads // tasks,
            "BLOCK": COUNTED,
        }  # fmt: skip
        yield Launch(choice.leave_out, (n_heads,), others, {"num_warps": 8})


def as_ranges(
    rows: Tensor, n_rows: Tensor, out: tuple[Tensor, Tensor], scored: Tensor, in_use: Tensor,
    first_row: int,
) -> Launch:  # fmt: skip
    """Writes ascending `rows [tasks, most]` as ranges `out`, two of `[n, H, capacity]`, and to
    `scored [n, H]` what is in use."""
    (tasks, most), (starts, lengths) = rows.shape, out
    return Launch(
        choice.as_ranges, (tasks,),
        {
            "rows": rows, "n_rows": n_rows, "begins": rows.new_empty(tasks, most + 1),
            "starts": starts, "lengths": lengths, "scored": scored, "in_use": in_use,
            "first_row": first_row, "k": most, "capacity": starts.shape[2],
            "heads": starts.shape[1],
            "starts_batch": starts.stride(0), "starts_head": starts.stride(1),
            "lengths_batch": lengths.stride(0), "lengths_head": lengths.stride(1),
            "BLOCK": 1024,
        },
        {"num_warps": 8},
    )  # fmt: skip


def digits_of_weights(tasks: int) -> int:
    """How many int32 `heaviest` counts digits in."""
    return WEIGHTS[0] * tasks << WEIGHTS[1]


def find_kth(
    numbers: Tensor, in_use: Tensor, counts: Tensor, kth: Tensor, k: int | Tensor, per_use: int,
    digits: tuple[int, int], every: int = 1,
) -> Iterator[Launch]:  # fmt: skip
    """Finds the k-th of `numbers [heads, room]`, of which `in_use[head // per_use]` count.

    `every`: one of so many numbers is looked at, and a k of each head is of these.
    """
    n_heads, room = numbers.shape
    passes, bits = digits
    own = isinstance(k, Tensor)
    about = {
        "counts": counts, "k": k if own else k // every, "PASSES": passes, "BITS": bits,
        "OWN_K": own,
    }  # fmt: skip
    for number in range(passes):
        yield Launch(
            choice.count_digits, (triton.cdiv(triton.cdiv(room, every), DIGITS), n_heads),
            {
                "numbers": numbers, "in_use": in_use, "room": room, "per_use": per_use,
                "PASS": number, "EVERY": every, "BLOCK": DIGITS, **about,
            },
            {"num_warps": 8},
        )  # fmt: skip
    yield Launch(choice.find_kth, (n_heads,), {"kth": kth, **about}, {"num_warps": 1})


def padded(blocks: int) -> int:
    """A power of two that Triton can have so many numbers in."""
    return max(2, triton.next_power_of_2(blocks))
