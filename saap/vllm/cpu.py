"""vLLM's CPU attention with sparse decode steps: each KV head visits pages of its own.

vLLM's paged kernel is used as it is. A KV head of a request becomes a request of one head over a
block table that lists the chosen pages only. Keys are coded when they are written, in the place
where they are written; RoPE need not be taken off, for products of queries with keys are all that
is asked of codes.
"""

import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

from saap.kernels.pages import PageCodes, select_pages

from .decode import SparseBackend, SparseBuilder, SparseImpl
from .plan import PAGE, Plan, Shape, make_plan
from .rotations import rotation_on


class SaapCpuBackend(SparseBackend, CPUAttentionBackend):
    """Stands in for CPU_ATTN, under its name."""

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec=None):
        """One size: vLLM's blocks of 128 tokens, say, become four pages of the kernel's."""
        return [PAGE]

    @staticmethod
    def get_impl_cls():
        return SaapCpuImpl

    @staticmethod
    def get_builder_cls():
        return SaapCpuBuilder


class SaapCpuBuilder(SparseBuilder, CPUAttentionMetadataBuilder):
    """Plans steps that visit pages."""

    def saap_refusal(self) -> str | None:
        if self.block_size != PAGE:
            return f"the kernel's pages must hold {PAGE} tokens; got {self.block_size}"
        return None

    def saap_plan(self, lens, most, options):
        if int(lens.max()) <= options.dense_below or int(lens.min()) < 1:
            return None
        shape = Shape(self.num_heads, self.num_kv_heads, self.head_dim, self.dtype, self.isa)
        return make_plan(lens, options, shape)

    def saap_trial_caches(self, pages: int) -> list[Tensor]:
        shape = pages, self.num_kv_heads, PAGE, 2 * self.head_dim
        return [torch.zeros(shape, dtype=self.dtype)]


class SaapCpuImpl(SparseImpl, CPUAttentionBackendImpl):
    """Visits pages through vLLM's own kernel."""

    def choose_pages(
        self, query: Tensor, codes: PageCodes, plan: Plan, block_table: Tensor, seq_lens: Tensor
    ) -> Tensor:
        """int32 `[R * Hkv, most]`, the pages to visit as the kernel's block table."""
        table = torch.empty(
            plan.requests * codes.kv_heads, plan.most, dtype=torch.int32, device=query.device
        )
        rotated = query.float() @ rotation_on(self.head_size, self.scale, query.device)
        return select_pages(
            rotated, codes, block_table, seq_lens, plan.keep, sink_pages=plan.sink_pages,
            window_pages=plan.window_pages, out=table,
        )  # fmt: skip

    def attend_sparsely(
        self, layer, query, kv_cache, codes, plan, block_table, seq_lens, output
    ) -> None:
        table = self.choose_pages(query, codes, plan, block_table, seq_lens)
        blocks, heads, page, _ = kv_cache.shape
        n, dim = plan.requests * heads, self.head_size
        pages = kv_cache.view(blocks * heads, 1, 2 * page, dim)
        key_cache, value_cache = pages.chunk(2, dim=2)
        own = output.view(n, -1, dim)
        ops.cpu_attention_with_kv_cache(
            query=query.reshape(n, -1, dim),
            key_cache=key_cache,
            value_cache=value_cache,
            output=own,
            query_start_loc=plan.query_start_loc,
            seq_lens=plan.seq_lens,
            scale=self.scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=table,
            softcap=0,
            scheduler_metadata=plan.schedule,
            s_aux=None,
            dynamic_causal=None,
            k_scale=layer._k_scale_float,
            v_scale=layer._v_scale_float,
            kv_cache_dtype=self.kv_cache_dtype,
        )
