"""What sparse decoding adds to an attention backend of vLLM's, whichever it is.

Three mix-ins, to stand before vLLM's own classes among the bases: of the backend, of what plans a
step, and of what does in each layer what is planned and leaves the rest to vLLM.
"""

from dataclasses import replace

from torch import Tensor
from vllm.config import get_layers_from_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention

from saap.kernels.pages import PageCodes, encode_rows

from .checks import group_refusal, layer_refusal, try_kernel
from .options import Options, required_options
from .rotations import rotation_on

log = init_logger("vllm.saap")


class SparseBackend:
    """What holds for sparse decoding on any device."""

    @classmethod
    def supports_kv_connector(cls) -> bool:
        """Keys that a connector loads are written past `do_kv_cache_update`."""
        return False


class SparseBuilder:
    """Adds `saap`, a plan or None, to the metadata of a step.

    A plan is of the class that the backend needs; it has `requests`, so many of the first of a
    step decode sparsely, and `rest`, vLLM's metadata of the requests behind them, or None.
    """

    supports_update_block_table = False  # a plan's `rest` has a block table of its own

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1)  # requests that decode come first
        self.saap_options = required_options()
        refusal = group_refusal(kv_cache_spec, vllm_config) or self.saap_refusal()
        self.saap_serves = refusal is None
        if refusal is not None:
            log.warning("Saap leaves %d layers dense: %s.", len(layer_names), refusal)
            return
        for layer in self.saap_layers()[:1]:
            try_kernel(self, layer)
        key_bytes = 2 * kv_cache_spec.head_size * kv_cache_spec.dtype.itemsize
        log.info_once(
            "Saap decodes sparsely: %s. Codes take %.1f %% more than the KV cache's memory.",
            self.saap_options, 100 * (kv_cache_spec.head_size / 2 + 4) / key_bytes,
        )  # fmt: skip

    def saap_layers(self) -> list:
        """vLLM's layers of this group that decode sparsely."""
        layers = get_layers_from_vllm_config(self.vllm_config, Attention, self.layer_names)
        return [x for x in layers.values() if getattr(x.impl, "saap_serves", False)]

    def saap_refusal(self) -> str | None:
        """Why this backend cannot serve the group, or None."""
        return None

    def saap_plan(self, lens: Tensor, most: int, options: Options):
        """The plan of requests with `lens [R]` int32 tokens, of which `most` is the largest."""
        raise NotImplementedError

    def saap_trial_caches(self, pages: int) -> list[Tensor]:
        """Small caches `[pages, Hkv, rows, 2 D]`, one for each layout that may come."""
        raise NotImplementedError

    def build(self, common_prefix_len, common_attn_metadata, fast_build=False):
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)
        metadata.saap = self._plan(metadata, common_attn_metadata)
        return metadata

    def _plan(self, metadata, common):
        """None where the whole step is dense."""
        if not self.saap_serves or metadata.causal is not True:
            return None
        n = leading_decodes(common.query_start_loc_cpu[: common.num_reqs + 1])
        if n == 0 or common.max_seq_len <= self.saap_options.dense_below:
            return None
        plan = self.saap_plan(common.seq_lens[:n], common.max_seq_len, self.saap_options)
        if plan is not None and n < common.num_reqs:
            # No schedule made beforehand: its place in memory is that of the whole step's.
            plan.rest = super().build(0, behind(common, n), fast_build=True)
        return plan


class SparseImpl:
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
        plan = getattr(attn_metadata, "saap", None)
        fused = output_scale is not None or output_block_scale is not None
        if plan is None or fused or not self.saap_serves or self.saap_codes is None:
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale,
                output_block_scale,
            )  # fmt: skip
        n = plan.requests
        try:
            self.attend_sparsely(
                layer, query[:n], kv_cache, self.saap_codes, plan, attn_metadata.block_table[:n],
                attn_metadata.seq_lens[:n], output[:n],
            )  # fmt: skip
        except ValueError as error:  # of the choice: no request fails because of it
            log.warning_once("Saap leaves a step dense: %s.", error)
            return super().forward(layer, query, key, value, kv_cache, attn_metadata, output)
        if plan.rest is not None:
            super().forward(layer, query[n:], key[n:], value[n:], kv_cache, plan.rest, output[n:])
        return output

    def attend_sparsely(
        self, layer, query, kv_cache, codes, plan, block_table, seq_lens, output
    ) -> None:
        """Exact attention of `query [R, Hq, D]` over what is chosen, into `output`."""
        raise NotImplementedError

    def do_kv_cache_update(self, layer, key, value, kv_cache, slot_mapping):
        super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
        if self.saap_serves:
            write_codes(key, slot_mapping, self.saap_codes_of(kv_cache))

    def saap_codes_of(self, kv_cache: Tensor) -> PageCodes:
        """The codes of the layer's cache, made where there are none for so many pages."""
        if self.saap_codes is None or self.saap_codes.pages != kv_cache.shape[0]:
            self.saap_codes = codes_for(kv_cache)
        return self.saap_codes


def codes_for(kv_cache: Tensor) -> PageCodes:
    """Codes for all pages of a cache `[pages, Hkv, rows, 2 D]`."""
    pages, heads, rows, both = kv_cache.shape
    return PageCodes.empty(pages, heads, rows, both // 2, kv_cache.device)


def write_codes(key: Tensor, slots: Tensor, codes: PageCodes) -> None:
    """Code `key [T, Hkv, D]` into the slots int64 `[T]` that it was written to."""
    n = len(slots)
    encode_rows(key[:n].float() @ rotation_on(codes.dim, 1.0, key.device), slots, codes)


def leading_decodes(query_start_loc: Tensor) -> int:
    """How many requests, from the first on, have one token in this step."""
    single = query_start_loc.diff() == 1
    return int(single.int().cumprod(0).sum())


def behind(common, n: int):
    """vLLM's description of a step without its first n requests, which have a token each."""
    last = common.num_reqs

    def part(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[n:last]

    starts, on_host = (
        t[n : last + 1] - n for t in (common.query_start_loc, common.query_start_loc_cpu)
    )
    return replace(
        common,
        query_start_loc=starts,
        query_start_loc_cpu=on_host,
        seq_lens=part(common.seq_lens),
        seq_lens_cpu_upper_bound=part(common.seq_lens_cpu_upper_bound),
        num_reqs=last - n,
        num_actual_tokens=common.num_actual_tokens - n,
        block_table_tensor=part(common.block_table_tensor),
        slot_mapping=common.slot_mapping[n:],
    )
