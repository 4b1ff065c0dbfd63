"""Layers that keep a latent instead of keys and values: MLA (DeepSeek-V2, arXiv 2405.04434).

A token has one latent `c [R]` and one key `r [P]` with RoPE, which all heads share; keys and
values of a head are linear maps of the latent. A model's own code expands those of all tokens at
every step. Here the latents are searched and attended as they are. A head's map of keys is
*absorbed* by its queries, that of values by what comes out: its score is `q W_k c + q_r r`, and
its output is `W_v` times the sum of latents. So there is one KV head, whose key is `[c, r]` and
whose value is the same vector, and all query heads are its group.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saap.index.rows import BucketRows


def is_latent(module: nn.Module) -> bool:
    """Whether an attention module keeps latents."""
    return hasattr(module, "expand_kv")


def dim_of(config) -> int | None:
    """R + P of a model whose layers keep latents, None of any other."""
    rank = getattr(config, "kv_lora_rank", None)
    return None if rank is None else rank + config.qk_rope_head_dim


def check_maps(module: nn.Module) -> None:
    """ValueError for maps of latents that are not plain matrices in memory."""
    own = module.kv_b_proj
    plain = type(own) is nn.Linear and own.bias is None and type(own.weight) is nn.Parameter
    hooked = own._forward_hooks or own._forward_pre_hooks
    replaced = "forward" in vars(own) and not hasattr(own, "_hf_hook")  # accelerate's: devices
    if not plain or hooked or replaced or own.weight.dtype.itemsize < 2 or own.weight.is_meta:
        raise ValueError(
            "kv_b_proj, which maps latents to keys and values, must be a torch.nn.Linear without "
            f"bias and hooks, in memory and not quantized; got {own}"
        )


def rows_of(model: nn.Module) -> BucketRows | None:
    """Rows for a layer's store that hold a latent once, as key and as value; None of a model whose
    layers keep keys and values."""
    kept = dim_of(model.config.get_text_config()) is not None
    return BucketRows(same={"v": "k"}) if kept else None


def joined(
    latent: Float[Tensor, "B 1 T R"], k_rope: Float[Tensor, "B 1 T P"]
) -> tuple[Float[Tensor, "B 1 T D"], Float[Tensor, "B 1 T D"]]:
    """Stands in for a module's `expand_kv`: keys and values of the one KV head."""
    both = torch.cat([latent, k_rope], -1)
    return both, both


def parted(
    config, keys: Float[Tensor, "B 1 T D"]
) -> tuple[Float[Tensor, "B 1 T R"], Float[Tensor, "B 1 T P"]]:
    """What `joined` put together: what transformers' caches hold."""
    return keys[..., : config.kv_lora_rank], keys[..., config.kv_lora_rank :]


def absorbed(module: nn.Module, q: Float[Tensor, "B H T Q"]) -> Float[Tensor, "B H T D"]:
    """Queries of `joined` keys. Raises ValueError as `check_maps`."""
    check_maps(module)  # it may have been replaced since the model was attached
    of_keys, _ = _maps(module)
    plain, rotated = q.split([module.qk_nope_head_dim, module.qk_rope_head_dim], -1)
    return torch.cat([plain @ of_keys, rotated], -1)


def values_of(module: nn.Module, out: Float[Tensor, "B H T D"]) -> Float[Tensor, "B H T V"]:
    """What attention over `joined` values gives, as the module's own attention would give it."""
    _, of_values = _maps(module)
    return out[..., : module.kv_lora_rank] @ of_values.mT


def _maps(module: nn.Module) -> tuple[Float[Tensor, "H N R"], Float[Tensor, "H V R"]]:
    sizes = [module.qk_nope_head_dim, module.v_head_dim]
    return module.kv_b_proj.weight.unflatten(0, (-1, sum(sizes))).split(sizes, 1)
