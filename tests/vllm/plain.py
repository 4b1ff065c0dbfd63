"""A stand-in for vLLM's FlashAttention on a CPU: its layout of the cache, in plain PyTorch.

With it the engine runs the GPU's way of decoding, all of it but FlashAttention's own kernels: rows
of a cache `[pages, Hkv, tokens, 2 D]` in either order of heads and tokens (`PLAIN_LAYOUT`).
"""

import os
from dataclasses import dataclass

import torch
from vllm.v1.attention.backend import AttentionImpl, AttentionMetadataBuilder
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.attention.backends.utils import get_num_attention_heads_from_layers
from vllm.v1.kv_cache_interface import KVCacheLayout

from saap.vllm.cuda import RowBuilder, RowImpl


class PlainBackend(CPUAttentionBackend):
    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec=None):
        return [16]

    @classmethod
    def supported_kv_cache_layouts(cls):
        return (KVCacheLayout[os.environ.get("PLAIN_LAYOUT", "LBNHC")],)

    @staticmethod
    def get_impl_cls():
        return PlainImpl

    @staticmethod
    def get_builder_cls():
        return PlainBuilder


@dataclass
class PlainMetadata:
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    causal: bool = True


class PlainBuilder(AttentionMetadataBuilder):
    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.num_heads_q = get_num_attention_heads_from_layers(vllm_config, layer_names)

    def build(self, common_prefix_len, common_attn_metadata, fast_build=False):
        own = common_attn_metadata
        return PlainMetadata(
            own.query_start_loc[: own.num_reqs + 1], own.seq_lens, own.block_table_tensor
        )


class PlainImpl(AttentionImpl):
    def __init__(
        self, num_heads, head_size, scale, num_kv_heads, alibi_slopes, sliding_window,
        kv_cache_dtype, logits_soft_cap=None, attn_type="decoder",
        kv_sharing_target_layer_name=None, sinks=None,
    ):  # fmt: skip
        self.num_heads, self.head_size, self.scale = num_heads, head_size, scale
        self.num_kv_heads, self.alibi_slopes, self.sinks = num_kv_heads, alibi_slopes, sinks
        self.sliding_window = (-1, -1) if sliding_window is None else (sliding_window - 1, 0)
        self.kv_cache_dtype, self.logits_soft_cap = kv_cache_dtype, logits_soft_cap
        self.attn_type = attn_type
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name

    def forward(
        self, layer, query, key, value, kv_cache, attn_metadata, output, output_scale=None,
        output_block_scale=None,
    ):  # fmt: skip
        if attn_metadata is None:
            return output.fill_(0)
        starts = attn_metadata.query_start_loc.tolist()
        for r, n in enumerate(attn_metadata.seq_lens.tolist()[: len(starts) - 1]):
            own = slice(starts[r], starts[r + 1])
            count = own.stop - own.start
            table = attn_metadata.block_table[r, : -(-n // kv_cache.shape[2])].long()
            rows = kv_cache[table].transpose(1, 2).flatten(0, 1)[:n].transpose(0, 1)
            k, v = rows.split(self.head_size, -1)
            mask = torch.ones(count, n, dtype=torch.bool).tril(n - count)
            found = torch.nn.functional.scaled_dot_product_attention(
                query[own].transpose(0, 1), k, v, mask, scale=self.scale, enable_gqa=True
            )
            output[own].view(count, self.num_heads, -1).copy_(found.transpose(0, 1))
        return output

    def do_kv_cache_update(self, layer, key, value, kv_cache, slot_mapping):
        n, rows = len(slot_mapping), kv_cache.shape[2]
        used = slot_mapping >= 0
        slots = slot_mapping[used]
        kv_cache[slots // rows, :, slots % rows] = torch.cat([key[:n], value[:n]], -1)[used]


class SaapPlainBackend(PlainBackend):
    @staticmethod
    def get_impl_cls():
        return SaapPlainImpl

    @staticmethod
    def get_builder_cls():
        return SaapPlainBuilder


class SaapPlainBuilder(RowBuilder, PlainBuilder):
    pass


class SaapPlainImpl(RowImpl, PlainImpl):
    pass
