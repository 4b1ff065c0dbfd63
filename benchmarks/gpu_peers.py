"""Dense decode attention of other libraries, behind one signature.

A peer takes `q [B, Hq, D]`, `k, v [B, Hkv, N, D]` and `lengths` (int32 `[B]` on the device, or
None for all rows) and returns a call to be timed. It raises `Unavailable` where the library is
not there or cannot do it. Peers that know no lengths read all rows: for a ragged batch that is
padding to the longest, unmasked, the least that it can cost them.
"""

import importlib
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

from .gpu_timing import Call

Peer = Callable[[Tensor, Tensor, Tensor, Tensor | None], Call]


class Unavailable(Exception):
    """The peer cannot run here; its text says why."""


def _sdpa_packed(backend: SDPBackend) -> Peer:
    """The query heads of a KV head as the query length of one head."""

    def build(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None) -> Call:
        packed = q.view(k.shape[0], k.shape[1], -1, q.shape[-1])

        def call() -> Tensor:
            with sdpa_kernel(backend):
                return sdpa(packed, k, v)

        return call

    return build


def sdpa_gqa(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None) -> Call:
    """What transformers calls: the weaker baseline."""

    def call() -> Tensor:
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION]):
            return sdpa(q[:, :, None], k, v, enable_gqa=True)

    return call


def sdpa_flash_each(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None) -> Call:
    """One packed call a sequence, each as long as its sequence: no padding, many launches."""
    packed = q.view(k.shape[0], k.shape[1], -1, q.shape[-1])
    rows = [k.shape[2]] * len(k) if lengths is None else lengths.tolist()

    def call() -> list[Tensor]:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return [
                sdpa(packed[b : b + 1], k[b : b + 1, :, :n], v[b : b + 1, :, :n])
                for b, n in enumerate(rows)
            ]

    return call


def flex(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None) -> Call:
    """FlexAttention's decode kernel; a block mask skips the rows past each length."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = None
    if lengths is not None:

        def within(b, h, q_index, kv_index):
            return kv_index < lengths[b]

        mask = create_block_mask(within, len(k), None, 1, k.shape[2], device=q.device)
    attention = flex_attention
    if q.is_cuda:
        attention = torch.compile(flex_attention, dynamic=False)
    return lambda: attention(q[:, :, None], k, v, block_mask=mask, enable_gqa=True)


def flash_attn(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None) -> Call:
    """FlashAttention 3 if it is there, else 2."""
    module = _import("flash_attn_interface", "flash_attn")
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    seqlens = lengths
    if seqlens is None:
        seqlens = torch.full((len(k),), k.shape[1], dtype=torch.int32, device=q.device)
    query = q[:, None]
    return lambda: module.flash_attn_with_kvcache(query, k, v, cache_seqlens=seqlens)


def flashinfer(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None) -> Call:
    """Paged decode on pages of 16 rows, planned on the host beforehand.

    Pages are cut from the same memory, so times compare but outputs do not.
    """
    module = _import("flashinfer")
    batch, kv_heads, rows, dim = k.shape
    page = 16
    lengths = torch.full((batch,), rows, dtype=torch.int32) if lengths is None else lengths.cpu()
    pages_k, pages_v = (
        x.view(-1)[: batch * kv_heads * (rows // page) * page * dim].view(-1, kv_heads, page, dim)
        for x in (k, v)
    )
    counts = (lengths + page - 1) // page
    counts = counts.clamp(max=rows // page)
    indptr = torch.cat([torch.zeros(1, dtype=torch.int32), counts.cumsum(0).int()])
    space = torch.empty(128 * 2**20, dtype=torch.uint8, device=q.device)
    wrapper = module.BatchDecodeWithPagedKVCacheWrapper(space, "HND", use_tensor_cores=True)
    wrapper.plan(
        indptr.to(q.device),
        torch.arange(int(indptr[-1]), dtype=torch.int32, device=q.device),
        (lengths - (counts - 1) * page).clamp(max=page).int().to(q.device),
        q.shape[1],
        kv_heads,
        dim,
        page,
        q_data_type=q.dtype,
        kv_data_type=k.dtype,
    )
    return lambda: wrapper.run(q, (pages_k, pages_v))


def _import(*names: str):
    for name in names:
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise Unavailable(f"not installed: {' or '.join(names)}")


SDPA: dict[str, Peer] = {
    "sdpa-flash-packed": _sdpa_packed(SDPBackend.FLASH_ATTENTION),
    "sdpa-cudnn-packed": _sdpa_packed(SDPBackend.CUDNN_ATTENTION),
    "sdpa-gqa": sdpa_gqa,
}
INSTALLED: dict[str, Peer] = {"flash-attn": flash_attn, "flashinfer": flashinfer}
EACH: dict[str, Peer] = {"sdpa-flash-each": sdpa_flash_each}
COMPILED: dict[str, Peer] = {"flex": flex}
