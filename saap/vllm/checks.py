"""What is served sparsely and what is left to vLLM's own attention; a trial of the kernels."""

import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionType
from vllm.v1.kv_cache_interface import CrossAttentionSpec, EncoderOnlyAttentionSpec

from .options import Options

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CACHE_DTYPES = ("auto", "float32", "bfloat16", "float16")


def group_refusal(spec, config) -> str | None:
    """Why no layer of a group of vLLM's may decode sparsely, or None.

    spec: of the group's KV cache; config: vLLM's, of everything.
    """
    if isinstance(spec, CrossAttentionSpec | EncoderOnlyAttentionSpec):
        return "they are no causal self-attention"
    if config.speculative_config is not None:
        return "speculative decoding is served densely"
    if config.kv_transfer_config is not None:
        return "keys that a KV connector loads have no codes"
    if config.parallel_config.decode_context_parallel_size > 1:
        return "a context that is divided between processes is served densely"
    cache_dtype, dtype = config.cache_config.cache_dtype, config.model_config.dtype
    if cache_dtype not in CACHE_DTYPES:
        return f"the KV cache must not be quantised; got {cache_dtype}"
    if dtype not in DTYPES:
        return f"dtype must be one of {', '.join(map(str, DTYPES))}; got {dtype}"
    if spec.head_size % 8:
        return f"the size of a head must be a multiple of 8; got {spec.head_size}"
    if getattr(spec, "head_size_v", spec.head_size) not in (None, spec.head_size):
        return f"keys and values must be of one size; got {spec.head_size}, {spec.head_size_v}"
    return None


def layer_refusal(impl) -> str | None:
    """Why this layer is left to vLLM's own attention, or None."""
    if impl.attn_type != AttentionType.DECODER:
        return "they are no causal self-attention"
    if impl.sliding_window not in (-1, (-1, -1)):
        return "they have a sliding window"
    if impl.alibi_slopes is not None:
        return "they use ALiBi"
    if impl.sinks is not None:
        return "they have learned sinks"
    if impl.logits_soft_cap:
        return "their scores are capped"
    if impl.kv_cache_dtype not in CACHE_DTYPES:
        return "their KV cache is quantised"
    if impl.kv_sharing_target_layer_name is not None:
        return "they use another layer's keys"
    return None


def try_kernel(builder, layer) -> None:
    """With everything visited, sparse attention must be exact attention; tried on random keys.

    builder: a SparseBuilder; layer: one of its layers that decodes sparsely.

    Raises ValueError when it is not: layouts of this vLLM are other than those it was tested with.
    """
    for cache in builder.saap_trial_caches(pages=12):
        error, dtype = _error(builder, layer, cache), cache.dtype
        # Rounding of the scores and of the output, in the coarser of the two dtypes.
        most = 8 * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps * 8)
        if not error <= most:
            raise ValueError(
                f"attention over all rows must be that over the whole cache, within {most:.0e}; "
                f"got a relative error of {error:.0e}: this vLLM lays out its cache in another "
                "way than those that Saap was tested with"
            )


def _error(builder, layer, cache: Tensor) -> float:
    from .decode import SparseImpl, codes_for, write_codes

    impl = layer.impl
    pages, kv_heads, page, both = cache.shape
    random = torch.Generator().manual_seed(0)
    lens = torch.tensor([page * 3 + 5, page, 7], dtype=torch.int32)
    table = torch.randperm(pages, generator=random).int().view(3, pages // 3)
    slots = torch.arange(pages * page)
    own = {"generator": random, "dtype": torch.float32}
    q, k, v = (
        torch.randn(n, heads, both // 2, **own).to(cache.device, cache.dtype)
        for n, heads in ((3, impl.num_heads), (len(slots), kv_heads), (len(slots), kv_heads))
    )
    slots, own_table, own_lens = (t.to(cache.device) for t in (slots, table, lens))
    super(SparseImpl, impl).do_kv_cache_update(layer, k, v, cache, slots)
    codes = codes_for(cache)
    write_codes(k, slots, codes)
    plan = builder.saap_plan(own_lens, int(lens.max()), Options(visited=1.0, dense_below=0))
    found, expected = torch.zeros_like(q), torch.zeros_like(q)
    impl.attend_sparsely(layer, q, cache, codes, plan, own_table, own_lens, found)
    for r, n in enumerate(lens.tolist()):
        own = own_table[r].long()
        expected[r] = exact(
            q[r], *(x.unflatten(0, (-1, page))[own].flatten(0, 1)[:n] for x in (k, v)), impl.scale
        )
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def exact(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention of `q [Hq, D]` over all rows of `k, v [n, Hkv, D]`, in double precision."""
    q, k, v = (x.double() for x in (q, k, v))
    scores = torch.einsum("hgd,nhd->hgn", q.unflatten(0, (k.shape[1], -1)), k)
    return torch.einsum("hgn,nhd->hgd", (scores * scale).softmax(-1), v).flatten(0, 1)
