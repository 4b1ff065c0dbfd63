"""vLLM's CPU attention with sparse decode steps: each KV head visits pages of its own.

vLLM's paged kernel is used as it is. A KV head of a request becomes a request of one head over a
block table that lists the chosen pages only. RoPE need not be taken off: queries and keys are
scored as attention sees them.
"""

import logging
from dataclasses import dataclass

import torch
from vllm import _custom_ops as ops
from vllm import envs
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

from saap.kernels.pages import select_pages

from .options import Options, read_options

log = logging.getLogger("vllm.saap")


@dataclass
class Plan:
    """What all layers of a group share in a step: how many pages, not which.

    `counts [R]` int32 pages per request, `most` their maximum; `seq_lens [R * Hkv]` int32 tokens
    in these pages; `query_start_loc [R * Hkv + 1]` int32; `scheduler` is the kernel's own.
    """

    counts: torch.Tensor
    most: int
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor
    scheduler: torch.Tensor


class SaapBackend(CPUAttentionBackend):
    @staticmethod
    def get_impl_cls():
        return SaapImpl

    @staticmethod
    def get_builder_cls():
        return SaapMetadataBuilder


class SaapMetadataBuilder(CPUAttentionMetadataBuilder):
    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.saap_options = read_options() or Options(visited=1.0)
        refusal = self._refusal()
        self.saap_serves = refusal is None
        if refusal is not None:
            log.warning("Saap leaves %s layers dense: %s", len(layer_names), refusal)

    def _refusal(self) -> str | None:
        config = self.vllm_config
        if self.dtype != torch.float32:
            return f"it needs dtype float32, got {self.dtype}"
        if self.kv_cache_dtype not in ("auto", "float32"):
            return f"the KV cache must not be quantized, got {self.kv_cache_dtype}"
        if self.isa not in ("vec", "vec16"):
            return f"the layout of keys is known for vec and vec16, got {self.isa}"
        if self.window_size != -1 or self.is_cross_attention or self.is_encoder_only_attention:
            return "they have a sliding window or are not causal self-attention"
        if config.speculative_config is not None or config.kv_transfer_config is not None:
            return "speculative decoding and KV connectors are served densely"
        return None

    def build(self, common_prefix_len, common_attn_metadata, fast_build=False):
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)
        metadata.saap = self._plan(metadata) if self.saap_serves else None
        return metadata

    def _plan(self, metadata: CPUAttentionMetadata) -> Plan | None:
        """None where the whole step is dense: not all requests decode, or all are short."""
        options, page = self.saap_options, self.block_size
        n = metadata.seq_lens.shape[0]
        if (
            metadata.max_query_len != 1
            or metadata.num_actual_tokens != n
            or metadata.causal is not True
            or metadata.max_seq_len <= options.dense_below
        ):
            return None
        lens = metadata.seq_lens.long()
        if int(lens.min()) < 1:
            return None
        pages = (lens + page - 1) // page
        forced = -(-options.sinks // page) + -(-options.window // page) + 1
        wanted = (pages * options.visited).ceil().long().clamp(min=forced)
        counts = torch.where(lens <= options.dense_below, pages, torch.minimum(wanted, pages))
        tokens = (counts * page - (pages * page - lens)).int()
        heads = self.num_kv_heads
        seq_lens = tokens.repeat_interleave(heads)
        starts = torch.arange(n * heads + 1, dtype=torch.int32)
        scheduler = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=n * heads, num_heads=self.num_heads // heads, num_kv_heads=1,
            head_dim=self.head_dim, seq_lens=seq_lens, dtype=self.dtype, query_start_loc=starts,
            causal=True, sliding_window_size=-1, isa=self.isa,
            enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV, kv_cache_dtype=self.kv_cache_dtype,
        )  # fmt: skip
        return Plan(counts.int(), int(counts.max()), seq_lens, starts, scheduler)


class SaapImpl(CPUAttentionBackendImpl):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.saap_options = read_options() or Options(visited=1.0)
        self.saap_serves = (
            self.alibi_slopes is None
            and self.sliding_window == -1
            and self.sinks is None
            and self.attn_type == AttentionType.DECODER
        )

    def forward(
        self, layer, query, key, value, kv_cache, attn_metadata, output, output_scale=None,
        output_block_scale=None,
    ):  # fmt: skip
        plan = getattr(attn_metadata, "saap", None)
        fused = output_scale is not None or output_block_scale is not None
        if plan is None or fused or not self.saap_serves:
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale,
                output_block_scale,
            )  # fmt: skip
        n = attn_metadata.num_actual_tokens
        blocks, heads, page, _ = kv_cache.shape
        dim, group = self.head_size, self.num_queries_per_kv
        halves = kv_cache.view(blocks, heads, 2 * page, dim)
        keys = halves[:, :, :page].reshape(blocks, heads, dim, page)  # a view: K is [D, N]
        table = torch.empty(n, heads, plan.most, dtype=torch.int32)
        options = self.saap_options
        select_pages(
            query[:n].view(n, heads * group, dim), keys, attn_metadata.block_table,
            attn_metadata.seq_lens, plan.counts, sm_scale=self.scale,
            sink_pages=-(-options.sinks // page), window_pages=-(-options.window // page) + 1,
            out=table,
        )  # fmt: skip
        each = kv_cache.view(blocks * heads, 1, 2 * page, dim)
        key_cache, value_cache = each.chunk(2, dim=2)
        ops.cpu_attention_with_kv_cache(
            query=query[:n].reshape(n * heads, group, dim),
            key_cache=key_cache,
            value_cache=value_cache,
            output=output[:n].view(n * heads, group, dim),
            query_start_loc=plan.query_start_loc,
            seq_lens=plan.seq_lens,
            scale=self.scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=table.view(n * heads, plan.most),
            softcap=self.logits_soft_cap,
            scheduler_metadata=plan.scheduler,
            s_aux=None,
            dynamic_causal=None,
            k_scale=layer._k_scale_float,
            v_scale=layer._v_scale_float,
            kv_cache_dtype=self.kv_cache_dtype,
        )
        return output
