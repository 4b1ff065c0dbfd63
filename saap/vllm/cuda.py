"""vLLM's FlashAttention with sparse decode steps: each KV head visits rows of its own.

Written against the interface of the tested version and tried on a CPU with a stand-in for
FlashAttention (`tests/vllm/plain.py`); not yet run on a GPU.
"""

import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

from .decode import SparseBackend, SparseBuilder, SparseImpl, write_codes
from .rows import RowPlan, attend_rows

MOST_HEADS = 16
"""Query heads of a KV head that the kernel takes."""


class RowBuilder(SparseBuilder):
    """Plans steps that visit rows."""

    def saap_refusal(self) -> str | None:
        spec = self.kv_cache_spec
        group = self.num_heads_q // spec.num_kv_heads
        if spec.head_size % 16 or spec.head_size > 256:
            return f"the size of a head must be a multiple of 16 up to 256; got {spec.head_size}"
        if group > MOST_HEADS:
            return f"at most {MOST_HEADS} query heads may share a KV head; got {group}"
        return None

    def saap_plan(self, lens, most, options):
        return RowPlan(len(lens), most, options)

    def build_for_cudagraph_capture(self, common_attn_metadata):
        """A graph serves any length that the model can have.

        Nothing may be made or compiled while it is captured, and vLLM may capture the first step
        that there is: so memory is taken here, and a step is done.
        """
        metadata = super().build_for_cudagraph_capture(common_attn_metadata)
        plan = metadata.saap
        if plan is None:
            return metadata
        plan.most, n = self.vllm_config.model_config.max_model_len, plan.requests
        for number, layer in enumerate(self.saap_layers()):
            impl, cache = layer.impl, layer.kv_cache
            codes = impl.saap_codes_of(cache)
            if number == 0:
                own = {"dtype": cache.dtype, "device": cache.device}
                query = torch.zeros(n, impl.num_heads, codes.dim, **own)
                nowhere = torch.full((n,), -1, dtype=torch.int64, device=cache.device)
                write_codes(query[:, : codes.kv_heads], nowhere, codes)
                impl.attend_sparsely(
                    layer, query, cache, codes, plan, metadata.block_table[:n],
                    metadata.seq_lens[:n], torch.empty_like(query),
                )  # fmt: skip
        return metadata

    def saap_trial_caches(self, pages: int) -> list[Tensor]:
        spec = self.kv_cache_spec
        rows, heads, both = spec.block_size, spec.num_kv_heads, 2 * spec.head_size
        own = {"dtype": spec.dtype, "device": self.device}
        return [
            torch.zeros(pages, heads, rows, both, **own),
            torch.zeros(pages, rows, heads, both, **own).transpose(1, 2),
        ]


class RowImpl(SparseImpl):
    """Visits rows through kernels of our own."""

    def attend_sparsely(
        self, layer, query, kv_cache, codes, plan, block_table, seq_lens, output
    ) -> None:
        attend_rows(
            query, kv_cache, codes, block_table, seq_lens, output, most=plan.most,
            scale=self.scale, options=plan.options,
        )  # fmt: skip


class SaapCudaBackend(SparseBackend, FlashAttentionBackend):
    """CUSTOM: FlashAttention, but for decode steps."""

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls():
        return SaapCudaImpl

    @staticmethod
    def get_builder_cls():
        return SaapCudaBuilder


class SaapCudaBuilder(RowBuilder, FlashAttentionMetadataBuilder):
    @classmethod
    def get_cudagraph_support(cls, vllm_config, kv_cache_spec):
        """Steps in which every request decodes; mixed ones run attention as it is."""
        return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE


class SaapCudaImpl(RowImpl, FlashAttentionImpl):
    pass
