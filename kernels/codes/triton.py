"""Choice of rows by coded keys on a GPU: scores, counted digits, lists (`triton_choice`).

Shapes depend on arguments alone and nothing waits for the GPU, so a step can be captured in a
CUDA graph. Coarse scores are whole numbers of 16 bits; what is like a head's last candidate is let
through with it, and where there are thousands, which one is the last is found from a sample. Of
chosen rows that are equal the first come first. On CPU tensors it runs in Triton's interpreter, if
`TRITON_INTERPRET=1` was set before triton was imported.
"""

import functools
from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from saap.kernels.backends.graphs import replayed
from saap.kernels.backends.launches import Launch, launch_all

from . import triton_choice as choice
from .layout import Codes, candidates_of
from .query_map import QueryMap
from .reference import tables
from .triton_kernels import score_codes
from .triton_shared import (
    COUNTED,
    add_weights,
    as_ranges,
    digits_of_weights,
    find_kth,
    heaviest,
    mapped_queries,
    padded,
    queries_in_bytes,
)

INTERPRETED = not isinstance(score_codes, triton.JITFunction)
BLOCKS, WARPS = (256, 128), (2, 4)  # of a program that scores rows by coarse codes, by whole ones
MOST_TOGETHER = 4  # query heads that a program scores together
SPARE = 8  # candidates more than asked for, as a share of them, that there is room for
SAMPLED, MOST_SKIPPED = 1024, 8
"""One row of so many at most is looked at, and of those so many at least have to be candidates:
then the number of these is right within 3 % (a standard deviation)."""
COARSE = 3, 6  # passes over coarse scores, bits of a digit


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
        n_candidates: int, one_of: int | None, query_map: QueryMap | None,
        min_weight: float | None, first_row: int, out: tuple[Tensor, Tensor], scored: Tensor,
        left_out: Tensor | None,
    ):  # fmt: skip
        self.a = torch.empty(shape, device=scored.device, dtype=torch.float32)
        self.outside: Tensor | None = None
        self.wanted = n_candidates, one_of
        self.counts = tuple(torch.empty_like(t) for t in _counts_of(n_rows, self.a, *self.wanted))
        self.options = {
            "max_tokens": max_tokens, "n_candidates": candidates_of(codes.n, *self.wanted),
            "query_map": query_map,
            "min_weight": min_weight, "first_row": first_row, "out": out, "scored": scored,
            "left_out": left_out, "most": codes.n, "counts": self.counts,
            "every": sampled(n_candidates),
        }  # fmt: skip
        self.codes = codes
        self.run = None
        self.follows(n_rows)

    def follows(self, n_rows: list[int]) -> bool:
        """It is for so many rows from now on."""
        for own, new in zip(self.counts, _counts_of(n_rows, self.a, *self.wanted), strict=True):
            own.copy_(new)
        return True

    def __call__(self, q: Tensor, outside: Tensor | None) -> None:
        """q: `[n, Hq, P]` float32, or with a map `[n, Hq, D]`; outside: `[n, Hq]`."""
        if self.run is None:
            if outside is not None:
                self.outside = torch.empty_like(outside, memory_format=torch.contiguous_format)
            # Nothing that holds on to this: a graph that waits for the garbage collector could
            # be let go of while another one is captured.
            work = functools.partial(
                _choose, self.a, self.codes, outside=self.outside, **self.options
            )
            self.run = replayed(work, q.device)
        self.a.view(q.shape).copy_(q)
        if outside is not None:
            self.outside.copy_(outside)
        self.run()


def select_rows(
    a: Tensor, codes: Codes, n_rows: list[int], *, max_tokens: int, n_candidates: int,
    one_of: int | None, query_map: QueryMap | None, min_weight: float | None,
    outside: Tensor | None, first_row: int, out: tuple[Tensor, Tensor], scored: Tensor,
    left_out: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`a [n, H, G, P]`, or with a map `[n, H, G, D]`: queries of the G heads that share each of
    the H selections."""
    most = max(n_rows)
    _choose(
        a, codes, max_tokens=max_tokens, n_candidates=candidates_of(most, n_candidates, one_of),
        query_map=query_map, min_weight=min_weight, outside=outside, first_row=first_row, out=out,
        scored=scored, left_out=left_out, most=most,
        counts=_counts_of(n_rows, a, n_candidates, one_of), every=sampled(n_candidates),
    )  # fmt: skip
    k = min(max_tokens, most)
    return out[0][..., :k], out[1][..., :k]


def _choose(a: Tensor, codes: Codes, **options: Any) -> None:
    launch_all(launches(a, codes, **options), a)


def launches(
    a: Tensor, codes: Codes, *, max_tokens: int, n_candidates: int, query_map: QueryMap | None,
    min_weight: float | None, outside: Tensor | None, first_row: int,
    out: tuple[Tensor, Tensor], scored: Tensor, left_out: Tensor | None, most: int,
    counts: tuple[Tensor, Tensor, Tensor], every: int = 1,
) -> Iterator[Launch]:  # fmt: skip
    """The kernels of a choice with all their arguments, on memory that is made here.

    `counts`: int32, rows of each task and of each sequence, none above `most`, and candidates of
    each head, none above `n_candidates`, of which one in `every` is looked for.
    """
    n, heads, group, dim = a.shape
    tasks, device, coordinates = n * heads, a.device, codes.coordinates
    k, n_candidates = min(max_tokens, most), min(n_candidates, most)
    all_rows, of_sequences, of_heads = counts
    listed, n_listed = None, all_rows

    def ints(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=device)

    def floats(*shape: int) -> Tensor:
        return torch.empty(shape, device=device, dtype=torch.float32)

    mapped = a.float().contiguous().view(-1, dim)
    if query_map is not None:
        mapping, mapped = mapped_queries(mapped, query_map, heads * group)
        yield mapping
    in_bytes, queries = queries_in_bytes(mapped, _tables(coordinates, device))
    yield in_bytes
    about = {
        "counts": of_sequences, "heads": heads, "by_sequence": int(len(of_sequences) > 1),
        "group": group, **_places(codes),
    }  # fmt: skip

    def scores(code: int, room: int, out: Tensor) -> Launch:
        together = min(MOST_TOGETHER, triton.next_power_of_2(group))
        return Launch(
            score_codes, (triton.cdiv(room, BLOCKS[code]), tasks, triton.cdiv(group, together)),
            {
                **{name: each[code] for name, each in queries.items()},
                "listed": n_listed if listed is None else listed, "n_listed": n_listed,
                "out": out, "room": room, **about, "WHOLE": code == 1,
                "LISTED": listed is not None, "BLOCK": BLOCKS[code], "HEADS": together,
                "ASM": not INTERPRETED,
            },
            {"num_warps": WARPS[code]},
        )  # fmt: skip

    n_heads = tasks * group
    of_candidates = COARSE[0] * n_heads << COARSE[1]
    digits = ints(of_candidates + digits_of_weights(tasks)).zero_()
    room = most
    if n_candidates < most:
        found = torch.empty(n_heads, most, dtype=torch.int16, device=device)
        kth = ints(2, n_heads)
        yield scores(0, most, found)
        yield from find_kth(found, all_rows, digits, kth, of_heads, group, COARSE, every)
        blocks = triton.cdiv(most, COUNTED)
        per_block = ints(tasks, blocks)
        room = min(most, group * (n_candidates + n_candidates // SPARE + 64))
        listed, n_listed = ints(tasks, room), ints(tasks)
        passing = {
            "scores": found, "kth": kth, "in_use": all_rows, "per_block": per_block,
            "group": group, "room": most, "n_blocks": blocks, "BLOCK": COUNTED,
        }  # fmt: skip
        grid, options = (blocks, tasks), {"num_warps": 8}
        yield Launch(choice.count_passing, grid, passing, options)
        places = {
            "listed": listed, "n_listed": n_listed, "list_room": room, "BLOCKS": padded(blocks),
        }  # fmt: skip
        yield Launch(choice.list_passing, grid, passing | places, options)
    found, weights = floats(n_heads, room), floats(tasks, room)
    yield scores(1, room, found)
    yield from add_weights(found, n_listed, weights, outside)
    rows, n_chosen = ints(tasks, k), ints(tasks)
    yield from heaviest(
        weights, n_listed, digits[of_candidates:], rows, n_chosen, k=k,
        least=0.0 if min_weight is None else float(min_weight), listed=listed, scores=found,
        left_out=left_out,
    )  # fmt: skip
    yield as_ranges(rows, n_chosen, out, scored, n_listed, first_row)


def _places(codes: Codes) -> dict[str, Any]:
    coarse, fine, scale = codes.coarse, codes.fine, codes.scale
    return {
        "coarse": coarse, "fine": fine, "scale": scale, "kv_heads": scale.shape[1],
        "coarse_batch": coarse.stride(0), "coarse_head": coarse.stride(1),
        "coarse_plane": coarse.stride(2), "fine_batch": fine.stride(0),
        "fine_head": fine.stride(1), "scale_batch": scale.stride(0),
        "scale_head": scale.stride(1), "N_WORDS": coarse.shape[2],
    }  # fmt: skip


def sampled(n_candidates: int) -> int:
    """The last candidate is looked for among one row in so many."""
    return max(1, min(MOST_SKIPPED, n_candidates // SAMPLED))


def _counts_of(
    n_rows: list[int], a: Tensor, n_candidates: int, one_of: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of each task of queries `a [n, H, G, ...]` and of each sequence, candidates of each
    head that are looked for; not to be changed."""
    rows, (n, heads, group) = tuple(n_rows), a.shape[:3]
    every = sampled(n_candidates)
    wanted = tuple(min(own, candidates_of(own, n_candidates, one_of)) // every for own in rows)
    return (
        _counts(rows, heads, n, a.device), _counts(rows, 1, len(rows), a.device),
        _counts(wanted, heads * group, n, a.device),
    )  # fmt: skip


@functools.lru_cache(maxsize=256)
def _counts(numbers: tuple[int, ...], each: int, n: int, device: torch.device) -> Tensor:
    """`each` times the number of each of n sequences, or n times that of one, int32.

    Kept, since a layer has as many rows as the one before it, and a copy cannot be captured.
    """
    of_sequence = torch.tensor(numbers, dtype=torch.int32, device=device).expand(n)
    return of_sequence.repeat_interleave(each)


@functools.lru_cache(maxsize=64)
def _tables(coordinates: int, device: torch.device) -> Tensor:
    """float32 `[2, 2, P]`: steps and zeros of coarse and of whole codes."""
    both = [torch.stack(tables(coordinates, whole, device, torch.float32)) for whole in (0, 1)]
    return torch.stack(both).contiguous()
