"""Public decode attention: validates, chooses a backend, never falls back from an explicit one.

Every backend is a module with a function
`attend_ranges(q, k, v, starts, lengths, *, sm_scale, softcap) -> (out, lse)`,
called with inputs that this module has validated; what else it cannot do its
`limit(q, k, v) -> str | None` names, if it has one. A backend with `CHECKS_VALUES` looks at the
values of ranges itself; a class `Prepared` does what `attend_ranges` does, many times.
"""

import functools
import importlib
from types import ModuleType
from typing import Literal

import torch
from jaxtyping import Float, Int32, Shaped
from torch import Tensor

from saap.kernels.backends import installed
from saap.kernels.backends.prepared import Preparation

from . import operator, validate
from .merge import merge_states

__all__ = ["attend_dense", "attend_ranges", "attend_shared_prefix", "merge_states"]

Impl = Literal["reference", "numba", "triton"]

BACKENDS = ("reference", "numba", "triton")


def attend_ranges(
    q: Float[Tensor, "B Hq D"],
    k: Shaped[Tensor, "B Hkv N width"],
    v: Shaped[Tensor, "B Hkv N width"],
    starts: Int32[Tensor, "B rows R"],
    lengths: Int32[Tensor, "B rows R"],
    *,
    sm_scale: float | None = None,
    softcap: float | None = None,
    impl: Impl | None = None,
) -> tuple[Float[Tensor, "B Hq D"], Float[Tensor, "B Hq"]]:
    """Exact softmax attention of one query token over ranges of the rows of a KV store.

    Work is divided by tiles over all rows, not by rows (LeanAttention, arXiv 2405.10480).

    Args:
        q: `[B, Hq, D]`, float32, bfloat16, float16 or (reference only) float64.
        k, v: `[B, Hkv, N, D]`, one dtype; `Hq` is a multiple of `Hkv`. Strided views are read
            in place as long as D is contiguous. Or int8 `[B, Hkv, N, D + 4]`, rows that
            `quantize_rows` made (reference and numba).
        starts, lengths: int32 `[B, Hkv, R]`, one selection for all query heads of a KV head, or
            `[B, Hq, R]`, one per query head. Range `i` is rows `[start, start + length)`; length
            0 is unused. The ranges of one row must not overlap: the reference checks it.
        sm_scale: factor of the scores; None is `D ** -0.5`.
        softcap: scores become `softcap * tanh(score / softcap)`; None is off.
        impl: `"reference"`, `"numba"` (CPU), `"triton"` (GPU, or its interpreter), or None, the
            best for the tensors' device.

    Returns:
        `out [B, Hq, D]` in q's dtype and `lse [B, Hq]`, float32, natural-log log-sum-exp of the
        scaled scores; 0 and -inf where a row's ranges are all empty. Rows that no range selects
        are never used, whatever they hold. No gradient. In a function that `torch.compile`
            compiles this is one operator of its graph.

    Raises:
        ValueError: an argument that does not fit, naming its value and the limit. Values of
            `starts, lengths` are checked on the CPU always, on a GPU if `SAAP_DEBUG=1`.
    """
    if torch.compiler.is_compiling():
        return operator.attend_ranges(q, k, v, starts, lengths, sm_scale, softcap, impl)
    backend, options = _checked(q, k, v, starts, lengths, sm_scale, softcap, impl)
    if not getattr(backend, "CHECKS_VALUES", False):
        validate.check_values(starts, lengths, k.shape[2])
    out, lse = backend.attend_ranges(q, k, v, starts, lengths, **options)
    return out, lse.float()


class PreparedRanges(Preparation):
    """`attend_ranges` over the same tensors at every call: all but the queries is checked once.

    So a decode step of a store costs little besides its kernel. The values of the tensors may
    change between calls; the tensors themselves, the number of torch's threads and the other
    arguments may not: `fits` says whether a preparation is still valid. Copying one gives None.

    Args and Raises: as `attend_ranges`; `starts, lengths` are contiguous.
    """

    def __init__(self, q, k, v, starts, lengths, *, sm_scale=None, softcap=None, impl=None):
        backend, options = _checked(q, k, v, starts, lengths, sm_scale, softcap, impl)
        for name, tensor in (("starts", starts), ("lengths", lengths)):
            if not tensor.is_contiguous():
                raise ValueError(f"{name} must be contiguous; got strides {tensor.stride()}")
        self._tensors = k, v, starts, lengths
        self._about = q.shape, q.dtype, q.device, sm_scale, softcap, impl, torch.get_num_threads()
        self._checks_values = getattr(backend, "CHECKS_VALUES", False)
        self._attend = None
        if hasattr(backend, "Prepared"):
            self._attend = backend.Prepared(q, *self._tensors, **options)

    @property
    def rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """Keys that it reads, and of which rows: `k, starts, lengths`."""
        k, _, starts, lengths = self._tensors
        return k, starts, lengths

    def fits(self, q, k, v, starts, lengths, *, sm_scale=None, softcap=None, impl=None) -> bool:
        """Whether this was made for the very tensors, and for queries and options like these."""
        own = self._tensors
        return (
            k is own[0] and v is own[1] and starts is own[2] and lengths is own[3]
            and self._about
            == (q.shape, q.dtype, q.device, sm_scale, softcap, impl, torch.get_num_threads())
        )  # fmt: skip

    def __call__(self, q: Float[Tensor, "B Hq D"]):
        """`out, lse` as `attend_ranges` of queries that this fits."""
        if self._attend is not None:
            if not self._checks_values:
                validate.check_values(*self._tensors[2:], self._tensors[0].shape[2])
            return self._attend(q)
        _, _, _, sm_scale, softcap, impl, _ = self._about
        return attend_ranges(q, *self._tensors, sm_scale=sm_scale, softcap=softcap, impl=impl)


def _checked(q, k, v, starts, lengths, sm_scale, softcap, impl) -> tuple[ModuleType, dict]:
    """The backend of a call, whose arguments but for the values of ranges are checked."""
    validate.check_tensors(q, k, v)
    validate.check_float_dtypes(q, k)
    validate.check_ranges(q, k, starts, lengths)
    if sm_scale is None:
        sm_scale = q.shape[-1] ** -0.5
    validate.check_scalars(sm_scale, softcap)
    return _backend(impl, q, k, v), {"sm_scale": sm_scale, "softcap": softcap}


def attend_dense(
    q: Float[Tensor, "B Hq D"],
    k: Shaped[Tensor, "B Hkv N width"],
    v: Shaped[Tensor, "B Hkv N width"],
    cache_seqlens: Int32[Tensor, " B"],
    *,
    sm_scale: float | None = None,
    softcap: float | None = None,
    impl: Impl | None = None,
) -> tuple[Float[Tensor, "B Hq D"], Float[Tensor, "B Hq"]]:
    """Attention over the first `cache_seqlens[b]` rows of each sequence: a ragged batch.

    As `attend_ranges` with one range for each row: LeanAttention itself (arXiv 2405.10480).

    Args:
        cache_seqlens: int32 `[B]`, rows in use of each sequence, 0 to N.
        q, k, v, sm_scale, softcap, impl: as in `attend_ranges`.

    Returns:
        `out [B, Hq, D]` in q's dtype and `lse [B, Hq]` float32, as in `attend_ranges`.

    Raises:
        ValueError: as in `attend_ranges`.
    """
    validate.check_tensors(q, k, v)
    if cache_seqlens.shape != q.shape[:1]:
        raise ValueError(
            f"cache_seqlens must be [B] with B = {q.shape[0]}; got {tuple(cache_seqlens.shape)}"
        )
    if cache_seqlens.dtype != torch.int32:
        raise ValueError(f"cache_seqlens must have dtype int32; got {cache_seqlens.dtype}")
    lengths = cache_seqlens.view(-1, 1, 1).expand(-1, k.shape[1], 1)
    starts = torch.zeros_like(lengths)
    return attend_ranges(q, k, v, starts, lengths, sm_scale=sm_scale, softcap=softcap, impl=impl)


def attend_shared_prefix(
    q: Float[Tensor, "B Hq D"],
    prefix_k: Shaped[Tensor, "Hkv P width"],
    prefix_v: Shaped[Tensor, "Hkv P width"],
    k: Shaped[Tensor, "B Hkv N width"],
    v: Shaped[Tensor, "B Hkv N width"],
    starts: Int32[Tensor, "B rows R"],
    lengths: Int32[Tensor, "B rows R"],
    *,
    sm_scale: float | None = None,
    softcap: float | None = None,
    impl: Impl | None = None,
) -> tuple[Float[Tensor, "B Hq D"], Float[Tensor, "B Hq"]]:
    """Attention over one prefix that all sequences share and over ranges of their own rows.

    The prefix is read once for the whole batch (once for as many sequences as a backend's
    `MAX_GROUP` query heads hold), then merged with each sequence's own part by lse.

    Args:
        prefix_k, prefix_v: `[Hkv, P, D]`, visited in full.
        q, k, v, starts, lengths, sm_scale, softcap, impl: as in `attend_ranges`.

    Returns:
        `out [B, Hq, D]` in q's dtype and `lse [B, Hq]` float32, as in `attend_ranges`.

    Raises:
        ValueError: as in `attend_ranges`.
    """
    validate.check_tensors(q, k, v)
    validate.check_prefix(prefix_k, prefix_v, k)
    options = {"sm_scale": sm_scale, "softcap": softcap, "impl": impl}
    own = attend_ranges(q, k, v, starts, lengths, **options)

    batch, q_heads, dim = q.shape
    kv_heads, prefix_rows = prefix_k.shape[:2]
    group = q_heads // kv_heads
    limit = getattr(_backend(impl, q, k, v), "MAX_GROUP", None) or batch * group
    seqlens = torch.full((1,), prefix_rows, dtype=torch.int32, device=q.device)
    outs, lses = [], []
    for part in q.split(max(1, limit // group)):
        packed = part.reshape(-1, kv_heads, group, dim).transpose(0, 1).reshape(1, -1, dim)
        out, lse = attend_dense(packed, prefix_k[None], prefix_v[None], seqlens, **options)
        outs.append(out.view(kv_heads, -1, group, dim).transpose(0, 1).reshape(part.shape))
        lses.append(lse.view(kv_heads, -1, group).transpose(0, 1).reshape(-1, q_heads))
    return merge_states(torch.cat(outs), torch.cat(lses), *own)


def _backend(impl: str | None, q: Tensor, k: Tensor, v: Tensor) -> ModuleType:
    if impl is None:
        return _module(best_impl(q, k, v))
    if impl not in BACKENDS:
        raise ValueError(f"impl must be None or one of {', '.join(BACKENDS)}; got {impl!r}")
    backend = _module(impl)
    refusal = backend.limit(q, k, v) if hasattr(backend, "limit") else None
    if refusal is not None:
        raise ValueError(refusal)
    return backend


def best_impl(q: Tensor, k: Tensor, v: Tensor) -> Impl:
    """The backend that `impl=None` takes for these tensors."""
    if q.device.type == "cuda":
        return "triton"
    if not installed("numba") or _module("numba").limit(q, k, v) is not None:
        return "reference"
    return "numba"


@functools.cache
def _module(impl: str) -> ModuleType:
    return importlib.import_module(f".{impl}", __package__)
