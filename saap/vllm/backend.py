"""vLLM's CPU attention with sparse decode steps: each KV head visits pages of its own.

vLLM's paged kernel is used as it is. A KV head of a request becomes a request of one head over a
block table that lists the chosen pages only. Keys are coded when they are written, in the place
where they are written; RoPE need not be taken off, for products of queries with keys are all that
is asked of codes.
"""

from dataclasses import replace

import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm.logger import init_logger
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

from saap.kernels.pages import PageCodes, encode_rows, rotation, select_pages

from .checks import check_kernel, group_refusal, layer_refusal
from .options import Options, required_options
from .plan import PAGE, Plan, Shape, leading_decodes, make_plan

log = init_logger("vllm.saap")


class SaapBackend(CPUAttentionBackend):
    """Stands in for CPU_ATTN, under its name."""

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec=None):
        """One size: vLLM's blocks of 128 tokens, say, become four pages of the kernel's."""
        return [PAGE]

    @classmethod
    def supports_kv_connector(cls) -> bool:
        """Keys that a connector loads are written past `do_kv_cache_update`."""
        return False

    @staticmethod
    def get_impl_cls():
        return SaapImpl

    @staticmethod
    def get_builder_cls():
        return SaapMetadataBuilder


class SaapMetadataBuilder(CPUAttentionMetadataBuilder):
    """Adds `saap`, a Plan or None, to the metadata of a step."""

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1)  # requests that decode come first
        self.saap_options = required_options()
        self.saap_shape = Shape(
            self.num_heads, self.num_kv_heads, self.head_dim, self.dtype, self.isa
        )
        refusal = group_refusal(self)
        self.saap_serves = refusal is None
        if refusal is not None:
            log.warning("Saap leaves %d layers dense: %s.", len(layer_names), refusal)
        else:
            check_kernel(self)
            log.info_once(
                "Saap decodes sparsely: %s. Codes take %.1f %% more than the KV cache's memory.",
                self.saap_options, 100 * (self.head_dim / 2 + 4) / self.saap_shape.key_bytes,
            )  # fmt: skip

    def build(self, common_prefix_len, common_attn_metadata, fast_build=False):
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)
        metadata.saap = self._plan(metadata, common_attn_metadata)
        return metadata

    def _plan(self, metadata, common) -> Plan | None:
        """None where the whole step is dense."""
        if not self.saap_serves or metadata.causal is not True:
            return None
        n = leading_decodes(metadata.query_start_loc)
        lens = metadata.seq_lens[:n]
        if n == 0 or int(lens.max()) <= self.saap_options.dense_below or int(lens.min()) < 1:
            return None
        plan = make_plan(lens, self.saap_options, self.saap_shape)
        if n < common.num_reqs:
            starts = common.query_start_loc[n : common.num_reqs + 1]
            rest = replace(
                common,
                query_start_loc=starts - starts[0],
                seq_lens=common.seq_lens[n:],
                num_reqs=common.num_reqs - n,
                num_actual_tokens=common.num_actual_tokens - n,
                block_table_tensor=common.block_table_tensor[n:],
                slot_mapping=common.slot_mapping[n:],
            )
            plan.rest = super().build(0, rest)
        return plan


class SaapImpl(CPUAttentionBackendImpl):
    """Holds the codes of its layer's keys, made when the first keys are written."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.saap_codes: PageCodes | None = None
        self.saap_options: Options = required_options()
        refusal = layer_refusal(self)
        self.saap_serves = refusal is None
        if refusal is not None:
            log.info_once("Saap leaves some layers dense: %s.", refusal)

    def forward(
        self, layer, query, key, value, kv_cache, attn_metadata, output, output_scale=None,
        output_block_scale=None,
    ):  # fmt: skip
        plan: Plan | None = getattr(attn_metadata, "saap", None)
        fused = output_scale is not None or output_block_scale is not None
        if plan is None or fused or not self.saap_serves or self.saap_codes is None:
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale,
                output_block_scale,
            )  # fmt: skip
        n = plan.requests
        try:
            self.attend_pages(
                layer, query[:n], kv_cache, self.saap_codes, plan, attn_metadata.block_table[:n],
                attn_metadata.seq_lens[:n], output[:n],
            )  # fmt: skip
        except ValueError as error:  # of the choice: no request fails because of it
            log.warning_once("Saap leaves a step dense: %s.", error)
            return super().forward(layer, query, key, value, kv_cache, attn_metadata, output)
        if plan.rest is not None:
            super().forward(layer, query[n:], key[n:], value[n:], kv_cache, plan.rest, output[n:])
        return output

    def choose_pages(
        self, query: Tensor, codes: PageCodes, plan: Plan, block_table: Tensor, seq_lens: Tensor
    ) -> Tensor:
        """int32 `[R * Hkv, most]`, the pages to visit as the kernel's block table."""
        table = torch.empty(
            plan.requests * codes.kv_heads, plan.most, dtype=torch.int32, device=query.device
        )
        return select_pages(
            query.float() @ _scaled_rotation(self.head_size, self.scale), codes, block_table,
            seq_lens, plan.keep, sink_pages=plan.sink_pages, window_pages=plan.window_pages,
            out=table,
        )  # fmt: skip

    def attend_pages(
        self, layer, query, kv_cache, codes, plan, block_table, seq_lens, output
    ) -> None:
        """Exact attention of `query [R, Hq, D]` over the chosen pages, into `output`."""
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

    def do_kv_cache_update(self, layer, key, value, kv_cache, slot_mapping):
        super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
        if not self.saap_serves:
            return
        codes = self.saap_codes
        if codes is None or codes.pages != kv_cache.shape[0]:
            codes = self.saap_codes = codes_for(kv_cache)
        write_codes(key, slot_mapping, codes)


def codes_for(kv_cache: Tensor) -> PageCodes:
    """Codes for all pages of a cache `[pages, Hkv, rows, 2 D]`; memory is taken as it is used."""
    pages, heads, rows, both = kv_cache.shape
    return PageCodes.empty(pages, heads, rows, both // 2)


def write_codes(key: Tensor, slots: Tensor, codes: PageCodes) -> None:
    """Code `key [T, Hkv, D]` into the slots int64 `[T]` that it was written to."""
    n = len(slots)
    encode_rows(key[:n].float() @ rotation(codes.dim), slots, codes)


_rotations: dict[tuple[int, float], Tensor] = {}


def _scaled_rotation(dim: int, scale: float) -> Tensor:
    held = _rotations.get((dim, scale))
    if held is None:
        held = _rotations[dim, scale] = rotation(dim) * scale
    return held
