"""Dense attention of a chunk of new tokens over a cache that ends with that chunk.

A prefill in pieces, the verification of drafted tokens and the next turn of a chat all ask for it.
Every new token sees the whole past, whatever order its rows are in, so only the chunk against
itself needs a causal mask: the two parts are computed apart and merged by their lse. Keys and
values may be stored narrower than queries are, as int8 rows too: they are converted some rows at a
time.
"""

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from saap.kernels.attention.api import attend_dense, best_impl
from saap.kernels.attention.int8_rows import widened
from saap.kernels.attention.merge import merge_states

SCORES_AT_ONCE = 1 << 24
WIDENED = 4096  # rows of a narrower dtype that are converted at once
SHORT = 384
"""Query rows of a KV head, on a CPU; for more of them torch's kernel is as fast as ours."""

OutAndLse = tuple[Float[Tensor, "B Hq T D"], Float[Tensor, "B Hq T"]]


def attend_chunk(
    q: Float[Tensor, "B Hq T D"],
    k: Shaped[Tensor, "B Hkv N width"],
    v: Shaped[Tensor, "B Hkv N width"],
    *,
    sm_scale: float,
    softcap: float | None = None,
    sliding_window: int | None = None,
) -> OutAndLse:
    """Exact attention of the last T of N tokens, causal, aligned at the bottom right.

    The last T rows are the new tokens in time order; with `sliding_window`, which shows a token
    itself and the `sliding_window - 1` before it, all rows have to be in time order. `lse` is
    float32. Memory beside the result does not grow with N.
    """
    past, group = k.shape[2] - q.shape[2], q.shape[1] // k.shape[1]
    if sliding_window is not None and k.shape[2] <= sliding_window:
        sliding_window = None
    apart = sliding_window is None and past and _by_our_kernel(q, k, v)
    if apart or k.dtype != q.dtype:
        assert sliding_window is None
        options = {"sm_scale": sm_scale, "softcap": softcap}
        own = attend_chunk(q, *(widened(t[:, :, past:], q.dtype) for t in (k, v)), **options)
        if past == 0:
            return own
        return merge_states(*attend_past(q, k[:, :, :past], v[:, :, :past], **options), *own)
    fused = None if softcap is not None or sliding_window is not None else _fused_kernel(q)
    if fused is None:
        return _blockwise(q, k, v, sm_scale, softcap, sliding_window)
    # The chunk is short beside the cache: repeating its own keys for the query heads is cheap.
    own = (t[:, :, past:].repeat_interleave(group, 1) for t in (k, v))
    own = fused(q, *own, True, sm_scale)
    if past == 0:
        return own
    return merge_states(*attend_past(q, k[:, :, :past], v[:, :, :past], sm_scale=sm_scale), *own)


def attend_visible(
    q: Float[Tensor, "B Hq T D"],
    k: Shaped[Tensor, "B Hkv N width"],
    v: Shaped[Tensor, "B Hkv N width"],
    visible: Bool[Tensor, "B T N"],
    *,
    sm_scale: float,
    softcap: float | None = None,
) -> OutAndLse:
    """Exact attention of each token over the rows that it sees; 0 and -inf where it sees none."""
    group = q.shape[1] // k.shape[1]
    compute = torch.promote_types(q.dtype, torch.float32)
    keys, values = (widened(t, q.dtype).unsqueeze(2).to(compute) for t in (k, v))
    out = torch.empty_like(q)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    block = max(16, SCORES_AT_ONCE // (q.shape[0] * q.shape[1] * k.shape[2]))
    for start in range(0, q.shape[2], block):
        part = slice(start, start + block)
        packed = q[:, :, part].unflatten(1, (-1, group)).to(compute)
        scores = packed @ keys.mT * sm_scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~visible[:, None, None, part], -torch.inf)
        weights = scores.softmax(-1).nan_to_num(0.0)  # NaN: none was seen
        out[:, :, part] = (weights @ values).flatten(1, 2).to(out.dtype)
        lse[:, :, part] = scores.logsumexp(-1).flatten(1, 2)
    return out, lse


def attend_past(
    q: Float[Tensor, "B Hq T D"],
    k: Shaped[Tensor, "B Hkv N width"],
    v: Shaped[Tensor, "B Hkv N width"],
    *,
    sm_scale: float,
    softcap: float | None = None,
) -> OutAndLse:
    """Exact attention of T tokens over N rows, at least one, that every one of them sees."""
    if _by_our_kernel(q, k, v):  # each row is read once for all query rows
        seqlens = torch.full((len(q),), k.shape[2], dtype=torch.int32)
        options = {"sm_scale": sm_scale, "softcap": softcap}
        out, lse = attend_dense(q.flatten(1, 2), k, v, seqlens, **options)
        return out.unflatten(1, q.shape[1:3]), lse.unflatten(1, q.shape[1:3])
    if k.dtype != q.dtype:
        options = {"sm_scale": sm_scale, "softcap": softcap}
        found = None
        for both in zip(k.split(WIDENED, 2), v.split(WIDENED, 2), strict=True):
            own = attend_past(q, *(widened(t, q.dtype) for t in both), **options)
            found = own if found is None else merge_states(*found, *own)
        return found
    fused = None if softcap is not None else _fused_kernel(q)
    group = q.shape[1] // k.shape[1]
    packed = q.unflatten(1, (-1, group)).flatten(2, 3)
    if fused is not None:
        out, lse = fused(packed, k, v, False, sm_scale)
        out = out.unflatten(2, (group, -1)).flatten(1, 2).contiguous()
        return out, lse.unflatten(2, (group, -1)).flatten(1, 2)
    compute = torch.promote_types(q.dtype, torch.float32)
    out = torch.empty_like(q)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    block = max(16, SCORES_AT_ONCE // (q.shape[0] * q.shape[1] * k.shape[2]))
    for start in range(0, q.shape[2], block):
        own = q[:, :, start : start + block].unflatten(1, (-1, group)).to(compute)
        scores = own @ k.unsqueeze(2).to(compute).mT * sm_scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        found = scores.softmax(-1) @ v.unsqueeze(2).to(compute)
        out[:, :, start : start + block] = found.flatten(1, 2).to(out.dtype)
        lse[:, :, start : start + block] = scores.logsumexp(-1).flatten(1, 2)
    return out, lse


def _by_our_kernel(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether few query rows attend on a CPU, faster so than by torch."""
    few = q.shape[2] * (q.shape[1] // k.shape[1]) <= SHORT
    return few and best_impl(q, k, v) == "numba"


def _fused_kernel(q: Tensor):
    """`kernel(q, k, v, is_causal, sm_scale) -> out, lse` of torch for these tensors, or None.

    `scaled_dot_product_attention` computes the lse and drops it; these are the kernels behind it.
    """
    if q.device.type == "cpu" and q.dtype in (torch.float32, torch.bfloat16, torch.float16):
        return _fused_cpu
    if q.device.type == "cuda" and q.dtype in (torch.bfloat16, torch.float16):
        return _fused_cuda
    return None


def _fused_cpu(q, k, v, is_causal, sm_scale):
    found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, is_causal, scale=sm_scale
    )
    return found[0], found[1].float()


def _fused_cuda(q, k, v, is_causal, sm_scale):
    dim = q.shape[-1]
    if dim % 8:
        q, k, v = (torch.nn.functional.pad(t, (0, 8 - dim % 8)) for t in (q, k, v))
    found = torch.ops.aten._scaled_dot_product_flash_attention(
        q, k, v, 0.0, is_causal, False, scale=sm_scale
    )
    return found[0][..., :dim], found[1].float()


def _blockwise(q, k, v, sm_scale, softcap, sliding_window) -> OutAndLse:
    """A few query rows at a time against all that they see, in float32 at least."""
    n, length, group = k.shape[2], q.shape[2], q.shape[1] // k.shape[1]
    compute = torch.promote_types(q.dtype, torch.float32)
    out = torch.empty_like(q)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    block = max(16, SCORES_AT_ONCE // (q.shape[0] * q.shape[1] * n))
    for start in range(0, length, block):
        stop = min(start + block, length)
        rows = torch.arange(start, stop, device=q.device) + n - length
        first = 0 if sliding_window is None else max(0, start + n - length - sliding_window + 1)
        last = n - length + stop
        columns = torch.arange(first, last, device=q.device)
        hidden = columns > rows[:, None]
        if sliding_window is not None:
            hidden |= columns <= rows[:, None] - sliding_window
        packed = q[:, :, start:stop].unflatten(1, (-1, group)).to(compute)
        keys, values = (t[:, :, first:last].unsqueeze(2).to(compute) for t in (k, v))
        scores = packed @ keys.mT * sm_scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(hidden, -torch.inf)
        out[:, :, start:stop] = (scores.softmax(-1) @ values).flatten(1, 2).to(out.dtype)
        lse[:, :, start:stop] = scores.logsumexp(-1).flatten(1, 2)
    return out, lse
