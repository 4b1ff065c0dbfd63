"""What the functions of `api` say, in plain PyTorch: decode everything, sort."""

import torch
from torch import Tensor

from saap.kernels.codes.reference import as_ranges

from .layout import LARGEST, PER_WORD, QUERY_MAX, STEP, ZERO, PageCodes, decode


def encode_rows(keys: Tensor, slots: Tensor, codes: PageCodes) -> None:
    words, scales = coded(keys)
    used = slots >= 0
    page, row = slots[used] // codes.rows, slots[used] % codes.rows
    for n, (p, r) in enumerate(zip(page.tolist(), row.tolist(), strict=True)):
        codes.words[p, :, :, r] = words[used][n]
        codes.scales[p, :, r] = scales[used][n]


def coded(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Words int32 `[T, Hkv, D / 8]` and scales float32 `[T, Hkv]` of rotated keys."""
    x = torch.nan_to_num(keys.float(), nan=0.0, posinf=0.0, neginf=0.0)
    length = (x * x).mean(-1, keepdim=True).sqrt()
    inverse = torch.where(length > 0, 1 / (STEP * length), 0)
    code = (x * inverse + ZERO).round().clamp(0, LARGEST)
    match = ((code - ZERO) * x).sum(-1)
    scale = torch.where(match > 0, (x * x).sum(-1) / match, 0)
    parts = code.long().unflatten(-1, (-1, 2, PER_WORD // 2))
    shifts = torch.tensor([[8 * byte + 4 * half for byte in range(4)] for half in range(2)])
    words = (parts << shifts).flatten(-2).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32), scale


def select_pages(
    q: Tensor, codes: PageCodes, block_table: Tensor, seq_lens: Tensor, keep: Tensor,
    sink_pages: int, window_pages: int, out: Tensor,
) -> Tensor:  # fmt: skip
    heads, group = codes.kv_heads, q.shape[1] // codes.kv_heads
    for r, (n, kept) in enumerate(zip(seq_lens.tolist(), keep.tolist(), strict=True)):
        pages = -(-n // codes.rows)
        blocks = block_table[r, :pages].long()
        keys = keys_of(codes, blocks)
        for h in range(heads):
            weights = weights_of(q[r, h * group : (h + 1) * group], keys[:, h], n)
            of_page = torch.zeros(pages * codes.rows, dtype=torch.float32)
            of_page[:n] = weights
            of_page = of_page.view(pages, codes.rows).sum(-1)
            chosen = pages_to_visit(of_page, kept, sink_pages, window_pages)
            out[r * heads + h, : len(chosen)] = (blocks[chosen] * heads + h).to(torch.int32)
    return out


def select_rows(
    q: Tensor, codes: PageCodes, block_table: Tensor, seq_lens: Tensor, keep: Tensor,
    sinks: int, window: int, page_stride: int, most: int, out: tuple[Tensor, Tensor],
) -> None:  # fmt: skip
    group = q.shape[1] // codes.kv_heads
    for tensor in out:
        tensor.zero_()
    for r, (n, kept) in enumerate(zip(seq_lens.tolist(), keep.tolist(), strict=True)):
        if n == 0:
            continue
        blocks = block_table[r, : -(-n // codes.rows)].long()
        keys = keys_of(codes, blocks)
        for h in range(codes.kv_heads):
            weights = weights_of(q[r, h * group : (h + 1) * group], keys[:, h], n)
            weights[:sinks] = weights[max(0, n - window) :] = torch.inf
            order = weights.argsort(descending=True, stable=True)
            rows = order[:kept].sort().values
            pool = blocks[rows // codes.rows] * page_stride + rows % codes.rows
            for tensor, found in zip(out, as_ranges(pool), strict=True):
                tensor[r, h, : len(found)] = found


def keys_of(codes: PageCodes, pages: Tensor) -> Tensor:
    """The rotated keys of some pages, `[n, Hkv, rows, D]`."""
    return decode(PageCodes(codes.words[pages], codes.scales[pages]))


def weights_of(q: Tensor, keys: Tensor, n: int) -> Tensor:
    """Weights of the first n rows of `keys [pages, rows, D]`, added over queries `[G, D]`."""
    weights = (rounded(q) @ keys.flatten(0, 1)[:n].T).softmax(-1)
    return weights.nan_to_num(nan=0.0).sum(0)


def pages_to_visit(weights: Tensor, kept: int, sink_pages: int, window_pages: int) -> Tensor:
    """Numbers of pages, ascending: the first, the last, and the heaviest between; of equal ones
    the first."""
    pages = len(weights)
    if kept >= pages:
        return torch.arange(pages)
    first, last = sink_pages, pages - window_pages
    order = weights[first:last].argsort(descending=True, stable=True)
    between = order[: kept - sink_pages - window_pages].sort().values + first
    return torch.cat([torch.arange(first), between, torch.arange(last, pages)])


def rounded(q: Tensor) -> Tensor:
    """Queries as codes see them: whole numbers of a byte, times a factor for each head."""
    largest = q.abs().amax(-1, keepdim=True)
    usable = (largest > 0) & largest.isfinite()
    factor = torch.where(usable, largest / QUERY_MAX, 1)
    return torch.where(usable, (q / factor).round() * factor, 0)
