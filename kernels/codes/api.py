"""Public choice of rows by coded keys: validates, chooses a backend, never falls back from an
explicit one."""

import math
from collections.abc import Callable
from numbers import Real
from typing import Literal

import torch
from jaxtyping import Float, Int32, Int64
from torch import Tensor

from saap.kernels.backends import chosen
from saap.kernels.backends.prepared import Preparation

from .layout import Codes
from .query_map import QueryMap

Impl = Literal["reference", "numba", "triton"]
Ranges = tuple[Int32[Tensor, "n H R"], Int32[Tensor, "n H R"]]
BACKENDS = ("reference", "numba", "triton")


def select_rows(
    q: Float[Tensor, "n Hq P"] | Float[Tensor, "n Hq D"],
    codes: Codes,
    n_rows: list[int],
    *,
    max_tokens: int,
    n_candidates: int,
    one_of: int | None = None,
    query_map: QueryMap | None = None,
    min_weight: float | None = None,
    outside: Float[Tensor, "n Hq"] | None = None,
    share: Literal["group", "head"] = "group",
    first_row: int = 0,
    out: Ranges | None = None,
    scored: Int64[Tensor, "n H"] | None = None,
    left_out: Float[Tensor, "n Hq"] | None = None,
    impl: Impl | None = None,
) -> Ranges:
    """The rows with the largest attention weights that their codes predict, as ranges.

    Every row is scored by its coarse code. The `n_candidates` best of each query head are scored
    by all of their code, for all heads that share a selection; if there are no more rows than
    that, all are. A row then counts by the sum of the heads' softmax over the candidates and what
    is `outside`. Of equal rows the first comes first. Queries are rounded to bytes, with a scale
    for each head; where one is NaN or infinite, all rows are equal to it.

    Args:
        q: float32, queries `[n, Hq, P]` in the coordinates of the codes, scaled so that their
            product with a key's coordinates is the attention score; or queries `[n, Hq, D]` of
            which `query_map` makes such.
        codes: of `B` sequences; `B` is n, or 1 for queries that share one context. `Hq` is a
            multiple of their `Hkv`.
        n_rows: rows of each sequence, at most `codes.n`; rows after them hold anything.
        max_tokens: rows to choose, all if there are no more.
        n_candidates: rows that each head lets through to its fine codes; at least `max_tokens`.
        one_of: if given, each head lets through at least one row of so many that a sequence has.
        query_map: of the codes' KV heads, for n sequences or 1.
        min_weight: the least sum of a row that is chosen; None: any.
        outside: float32, for each head the log-sum-exp of the scores of rows that attention visits
            in any case, which takes its part of the softmax; NaN counts as -inf, as no rows do.
        share: "group": one selection for the query heads of a KV head, `H = Hkv`; "head": one
            each, `H = Hq`.
        first_row: number of the first row.
        out: int32 `starts, lengths [n, H, capacity]` to write to, with room for `max_tokens`
            ranges; what is not used is set to 0.
        scored: int64 `[n, H]` to write to how many rows were scored by all of their code.
        left_out: float32 `[n, Hq]` to write to what of these rows is not chosen: the log-sum-exp
            of a head's scores with them, -inf where there are none.
        impl: `"reference"`, `"numba"` (CPU), `"triton"` (GPU, or its interpreter), or None, the
            best that can do it.

    Returns:
        `starts, lengths` int32 `[n, H, R]`, ascending; views of `out` if given. Ranges of length
        0 are unused.

    Raises:
        ValueError: an argument that does not fit, or that `impl` cannot do, naming its value.
    """
    n, n_heads, _ = _check(q, codes, n_rows, max_tokens, n_candidates, one_of, share, query_map)
    _check_min_weight(min_weight)
    _check_outside(outside, q)
    heads = codes.scale.shape[1] if share == "group" else n_heads
    capacity = min(max_tokens, max(n_rows, default=0))
    if out is None:
        starts, lengths = torch.zeros(2, n, heads, capacity, dtype=torch.int32, device=q.device)
        out = starts, lengths
    _check_out(out, (n, heads), capacity)
    if scored is None:
        scored = torch.empty(n, heads, dtype=torch.int64, device=q.device)
    _check_scored(scored, (n, heads))
    _check_left_out(left_out, q)
    if capacity == 0 or n == 0:
        scored.zero_()
        if left_out is not None:
            left_out.fill_(-math.inf)
        return tuple(t.zero_()[..., :0] for t in out)
    backend = _backend(impl, q, codes, out)
    return backend.select_rows(
        q.unflatten(1, (heads, -1)), codes, n_rows, max_tokens=max_tokens,
        n_candidates=max(n_candidates, max_tokens), one_of=one_of, query_map=query_map,
        min_weight=min_weight, outside=outside, first_row=first_row, out=out, scored=scored,
        left_out=left_out,
    )  # fmt: skip


class PreparedChoice(Preparation):
    """`select_rows` by the same codes, into the same tensors, at every call: what does not change
    is checked once.

    So a decode step of a store costs little beside its kernel. What codes hold may change between
    calls; the tensors themselves and the other arguments may not, and numbers of rows where the
    backend can follow: `fits` says whether a preparation serves. A copy of a preparation is None.

    Args and Raises: as `select_rows`; `out` and `scored` are given.
    """

    __slots__ = (
        "_about", "_choose", "_codes", "_left_out", "_n_rows", "_options", "_out", "_scored",
    )  # fmt: skip

    def __init__(self, q, codes, n_rows, *, out, scored, left_out=None, impl=None, **options):
        n, n_heads, _ = _check(
            q, codes, n_rows, *(options[name] for name in ("max_tokens", "n_candidates")),
            options.get("one_of"), options["share"], options.get("query_map"),
        )  # fmt: skip
        _check_min_weight(options.get("min_weight"))
        heads = codes.scale.shape[1] if options["share"] == "group" else n_heads
        capacity = min(options["max_tokens"], max(n_rows, default=0))
        _check_out(out, (n, heads), capacity)
        _check_scored(scored, (n, heads))
        _check_left_out(left_out, q)
        backend = _backend(impl, q, codes, out)
        self._codes, self._out, self._scored, self._left_out = codes, out, scored, left_out
        self._options = {"impl": impl, **options}
        self._about = q.shape, q.device, torch.get_num_threads()
        self._n_rows = list(n_rows)
        self._choose = None
        if hasattr(backend, "Prepared") and capacity and n:
            self._choose = backend.Prepared(
                (n, heads, n_heads // heads, q.shape[2]), codes, n_rows,
                max_tokens=options["max_tokens"],
                n_candidates=max(options["n_candidates"], options["max_tokens"]),
                one_of=options.get("one_of"),
                query_map=options.get("query_map"), min_weight=options.get("min_weight"),
                first_row=options.get("first_row", 0), out=out, scored=scored, left_out=left_out,
            )  # fmt: skip

    def fits(self, q, codes, n_rows, *, out, scored, left_out=None, **options) -> bool:
        """Whether this serves these very tensors, queries and options like these, so many rows.

        It does from then on.
        """
        same = (
            codes is self._codes and scored is self._scored and left_out is self._left_out
            and out[0] is self._out[0] and out[1] is self._out[1] and options == self._options
            and self._about == (q.shape, q.device, torch.get_num_threads())
        )  # fmt: skip
        if not same or n_rows == self._n_rows:
            return same
        follows = getattr(self._choose, "follows", None)
        if follows is None or not self._holds(n_rows) or not follows(n_rows):
            return False
        self._n_rows = list(n_rows)
        return True

    def beside(
        self,
        k: Float[Tensor, "B Hkv N D"],
        starts: Int32[Tensor, "n Hkv R"],
        lengths: Int32[Tensor, "n Hkv R"],
        mean: Float[Tensor, "#B Hkv D"],
        sm_scale: float,
    ) -> Callable[[Float[Tensor, "n Hq D"]], Ranges] | None:
        """This choice, for queries whose scores with rows of `k` are worked out with it.

        They take the place of `outside`: the log-sum-exp of `sm_scale * q @ (k - mean)` over the
        ranges, which may change from call to call; what of them is not in k is left out. Returns
        None where the backend does not do it; only float32 on a CPU, now.
        """
        own = getattr(self._choose, "beside", None)
        choose = None if own is None else own(k, starts, lengths, mean, sm_scale)
        if choose is None:
            return None

        def of(q: Tensor) -> Ranges:
            choose(q)
            return self._out

        return of

    def _holds(self, n_rows) -> bool:
        """Whether codes and `out` have room for so many rows, of as many sequences."""
        most, max_tokens = max(n_rows), self._options["max_tokens"]
        return (
            len(n_rows) == len(self._n_rows) and min(n_rows) >= 0 and most <= self._codes.n
            and min(max_tokens, most) <= self._out[0].shape[2]
        )  # fmt: skip

    def __call__(
        self,
        q: Float[Tensor, "n Hq P"] | Float[Tensor, "n Hq D"],
        outside: Float[Tensor, "n Hq"] | None = None,
    ) -> Ranges:
        """`out` whole, of float32 queries that this fits."""
        if self._choose is not None:
            _check_outside(outside, q)
            self._choose(q, outside)
        else:
            n_rows = self._n_rows
            select_rows(
                q, self._codes, n_rows, outside=outside, out=self._out, scored=self._scored,
                left_out=self._left_out, **self._options,
            )  # fmt: skip
        return self._out


def _backend(impl, q, codes, out):
    return chosen(
        __package__, BACKENDS, impl, "triton" if q.device.type == "cuda" else "numba",
        lambda module: module.limit(q, codes, out),
    )  # fmt: skip


def _check(q, codes, n_rows, max_tokens, n_candidates, one_of, share, query_map) -> torch.Size:
    """The shape of q."""
    if codes.fault is not None:
        raise ValueError(codes.fault)
    batch, n_kv, n = codes.scale.shape
    dim = codes.coordinates
    if query_map is not None:
        _check_map(query_map, q, n_kv, dim)
        dim = query_map.weights.shape[2]
    if q.ndim != 3 or q.shape[2] != dim or q.shape[1] % n_kv or q.shape[1] == 0:
        raise ValueError(f"q must be [n, a multiple of {n_kv}, {dim}]; got {tuple(q.shape)}")
    if q.dtype != torch.float32:
        raise ValueError(f"q must be float32; got {q.dtype}")
    if batch not in (1, len(q)) or len(n_rows) != batch:
        raise ValueError(
            f"codes and n_rows must be of 1 sequence or of {len(q)}; got {batch} and {len(n_rows)}"
        )
    if any(not 0 <= own <= n for own in n_rows):
        raise ValueError(f"n_rows must be in 0..{n}; got {n_rows}")
    numbers = [("max_tokens", max_tokens, 0), ("n_candidates", n_candidates, 0)]
    for name, value, least in numbers + [("one_of", one_of, 1)] * (one_of is not None):
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be an integer of at least {least}; got {value!r}")
        if value >= 2**63:  # it would wrap on its way to the kernel
            raise ValueError(f"{name} must be an integer below 2 ** 63; got {value}")
    if share not in ("group", "head"):
        raise ValueError(f"share must be 'group' or 'head'; got {share!r}")
    return q.shape


def _check_map(query_map, q, n_kv, coordinates) -> None:
    if query_map.fault is not None:
        raise ValueError(query_map.fault)
    batch, heads, _, found = query_map.weights.shape
    if batch not in (1, len(q)) or (heads, found) != (n_kv, coordinates):
        raise ValueError(
            f"query_map must be of 1 sequence or of {len(q)}, of {n_kv} KV heads and of "
            f"{coordinates} coordinates; got {batch}, {heads} and {found}"
        )
    if query_map.weights.device != q.device:
        raise ValueError(
            f"query_map must be on q's device, {q.device}; got {query_map.weights.device}"
        )


def _check_min_weight(min_weight) -> None:
    if min_weight is not None and not (isinstance(min_weight, Real) and 0 < min_weight < math.inf):
        raise ValueError(f"min_weight must be None or a number above 0; got {min_weight!r}")


def _check_outside(outside, q) -> None:
    if outside is None:
        return
    if outside.shape != q.shape[:2] or outside.dtype != q.dtype or outside.device != q.device:
        raise ValueError(
            f"outside must be float32 {list(q.shape[:2])} on {q.device}; got {outside.dtype} "
            f"{list(outside.shape)} on {outside.device}"
        )


def _check_scored(scored, shape) -> None:
    fits = tuple(scored.shape) == shape and scored.dtype == torch.int64
    if not (fits and scored.is_contiguous()):
        raise ValueError(
            f"scored must be int64 {list(shape)}, contiguous; got {scored.dtype} "
            f"{list(scored.shape)} with strides {list(scored.stride())}"
        )


def _check_left_out(left_out, q) -> None:
    if left_out is None:
        return
    fits = left_out.shape == q.shape[:2] and left_out.dtype == torch.float32
    if not (fits and left_out.is_contiguous() and left_out.device == q.device):
        raise ValueError(
            f"left_out must be float32 {list(q.shape[:2])} on {q.device}, contiguous; got "
            f"{left_out.dtype} {list(left_out.shape)} on {left_out.device} with strides "
            f"{list(left_out.stride())}"
        )


def _check_out(out, shape, capacity) -> None:
    for name, tensor in zip(("starts", "lengths"), out, strict=True):
        fits = tensor.ndim == 3 and tuple(tensor.shape[:2]) == shape
        if not fits or tensor.shape[2] < capacity or tensor.dtype != torch.int32:
            raise ValueError(
                f"out's {name} must be int32 {[*shape, f'at least {capacity}']}; got "
                f"{tensor.dtype} {list(tensor.shape)}"
            )
