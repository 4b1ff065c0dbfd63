"""What is served sparsely and what is left to vLLM's own attention; a trial of the kernel."""

import torch
from torch import Tensor
from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionType

from .options import Options
from .plan import PAGE, make_plan

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def group_refusal(builder) -> str | None:
    """Why no layer of this group of vLLM's may decode sparsely, or None."""
    config, spec = builder.vllm_config, builder.kv_cache_spec
    if builder.is_cross_attention or builder.is_encoder_only_attention:
        return "they are no causal self-attention"
    if config.speculative_config is not None:
        return "speculative decoding is served densely"
    if config.kv_transfer_config is not None:
        return "keys that a KV connector loads have no codes"
    if builder.kv_cache_dtype not in ("auto", "float32", "bfloat16", "float16"):
        return f"the KV cache must not be quantised; got {builder.kv_cache_dtype}"
    if builder.dtype not in DTYPES:
        return f"dtype must be one of {', '.join(map(str, DTYPES))}; got {builder.dtype}"
    if builder.head_dim % 8:
        return f"the size of a head must be a multiple of 8; got {builder.head_dim}"
    if getattr(spec, "head_size_v", builder.head_dim) not in (None, builder.head_dim):
        return f"keys and values must be of one size; got {builder.head_dim}, {spec.head_size_v}"
    if builder.block_size != PAGE:
        return f"the kernel's pages must hold {PAGE} tokens; got {builder.block_size}"
    return None


def layer_refusal(impl) -> str | None:
    """Why this layer is left to vLLM's own attention, or None."""
    if impl.attn_type != AttentionType.DECODER:
        return "they are no causal self-attention"
    if impl.sliding_window != -1:
        return "they have a sliding window"
    if impl.alibi_slopes is not None:
        return "they use ALiBi"
    if impl.sinks is not None:
        return "they have learned sinks"
    if impl.logits_soft_cap:
        return "their scores are capped"
    if impl.is_fp8_kv_cache:
        return "their KV cache is quantised"
    if impl.kv_sharing_target_layer_name is not None:
        return "they use another layer's keys"
    return None


def check_kernel(builder) -> None:
    """With all pages, sparse attention must be vLLM's own; tried on random keys.

    Raises ValueError when it is not: layouts of this vLLM are other than those it was tested with.
    """
    from .backend import codes_for, write_codes

    layers = get_layers_from_vllm_config(builder.vllm_config, Attention, builder.layer_names)
    layer = next((x for x in layers.values() if getattr(x.impl, "saap_serves", False)), None)
    if layer is None:
        return
    impl, shape = layer.impl, builder.saap_shape
    random = torch.Generator().manual_seed(0)
    lens, most = torch.tensor([PAGE * 3 + 5, PAGE, 7], dtype=torch.int32), 4
    table = torch.randperm(3 * most, generator=random).int().view(3, most)
    cache = torch.zeros(3 * most, shape.kv_heads, PAGE, 2 * shape.dim, dtype=shape.dtype)
    slots = torch.arange(3 * most * PAGE)
    q, k, v = (
        torch.randn(n, heads, shape.dim, generator=random).to(shape.dtype)
        for n, heads in (
            (3, shape.heads),
            (len(slots), shape.kv_heads),
            (len(slots), shape.kv_heads),
        )
    )
    super(type(impl), impl).do_kv_cache_update(layer, k, v, cache, slots)
    codes = codes_for(cache)
    write_codes(k, slots, codes)
    found, expected = torch.zeros(2, 3, shape.heads, shape.dim, dtype=shape.dtype)
    plan = make_plan(lens, Options(visited=1.0, dense_below=0), shape)
    impl.attend_pages(layer, q, cache, codes, plan, table, lens, found)
    for r, n in enumerate(lens.tolist()):
        expected[r] = exact(q[r], *(x.unflatten(0, (-1, PAGE))[table[r].long()].flatten(0, 1)[:n]
                                    for x in (k, v)), impl.scale)  # fmt: skip
    error = float((found.double() - expected.double()).norm() / expected.double().norm())
    # Rounding of the scores and of the output, in the coarser of the two dtypes.
    most_error = 8 * max(torch.finfo(shape.dtype).eps, torch.finfo(torch.float32).eps * 8)
    if not error <= most_error:
        raise ValueError(
            "attention over all pages must be that over the whole cache, within "
            f"{most_error:.0e}; got a relative error of {error:.0e}: this vLLM lays out its cache "
            "in another way than those that Saap was tested with"
        )


def exact(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention of `q [Hq, D]` over all rows of `k, v [n, Hkv, D]`, in double precision."""
    q, k, v = (x.double() for x in (q, k, v))
    scores = torch.einsum("hgd,nhd->hgn", q.unflatten(0, (k.shape[1], -1)), k)
    return torch.einsum("hgn,nhd->hgd", (scores * scale).softmax(-1), v).flatten(0, 1)
