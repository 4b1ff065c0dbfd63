"""Checks the options of `attached` against the model: each ValueError names the value."""

import torch
from torch import nn

from saap.budget import Budget
from saap.distributed import Group
from saap.kv import checks
from saap.prefill import PrefillBudget
from saap.trained_index import TrainedIndex

from . import latent
from .families import ModelLayer
from .models import heads_of
from .pace import Verify


def check_kv_dtype(model: nn.Module, kv_dtype: torch.dtype | None) -> None:
    """ValueError for a dtype that the attention over this model's cache cannot read."""
    checks.check_kv_dtype(kv_dtype)
    if kv_dtype is None:
        return
    if kv_dtype.itemsize > model.dtype.itemsize:
        raise ValueError(
            f"kv_dtype must be no wider than the model's {model.dtype}; got {kv_dtype}"
        )
    device = model.device.type
    if device != "cpu" and kv_dtype not in (model.dtype, torch.int8):
        raise ValueError(
            f"kv_dtype must be None, int8 or {model.dtype}, as the model, on {device}; got "
            f"{kv_dtype}"
        )
    if device == "cuda" and kv_dtype == torch.int8 and model.dtype.itemsize != 2:
        raise ValueError(
            f"a model must be of 16 bits for kv_dtype torch.int8 on {device}; got {model.dtype}"
        )


def check_states(layers: list[ModelLayer], verify: Verify | None) -> None:
    """ValueError for lossless decoding of a model whose states keep what was drafted."""
    stateful = [number for number, layer in enumerate(layers) if layer.has_state]
    if stateful and verify is not None:
        raise ValueError(
            "verify must be None where layers keep a state, from which drafts cannot be taken "
            f"back; got {verify} and layer {stateful[0]} of kind {layers[stateful[0]].kind!r}"
        )


def check_shared(layers: list[ModelLayer], group: Group | None) -> None:
    """ValueError for a group and a model of which some layers share their keys."""
    shared = [number for number, layer in enumerate(layers) if layer.shares is not None]
    if shared and group is not None:
        raise ValueError(
            "group must be None where layers share keys and values; got a group and layer "
            f"{shared[0]}, which has those of layer {layers[shared[0]].shares}"
        )


def check_latents(model: nn.Module, group: Group | None) -> None:
    """ValueError for a model whose layers keep latents where these cannot be searched."""
    dim = latent.dim_of(model.config.get_text_config())
    if dim is None:
        return
    if group is not None:
        raise ValueError(
            f"group must be None where layers keep latents; got a group and {dim} dimensions"
        )
    if model.device.type != "cpu":
        raise ValueError(
            "a model whose layers keep latents must be on the CPU, since kernels of GPUs take "
            f"heads of up to 256 dimensions; got {model.device.type} and {dim} dimensions"
        )


def check_can_be_saved(model: nn.Module, layers: list[ModelLayer]) -> None:
    """ValueError for a model whose searched layers have heads of several sizes."""
    searched = [number for number, layer in enumerate(layers) if layer.is_full]
    shapes = sorted({heads_of(model.config, number)[1:] for number in searched})
    if len(shapes) > 1:
        raise ValueError(
            "layers with full attention must have as many KV heads and dimensions as each other "
            f"for contexts to be kept in files; got {' and '.join(map(str, shapes))}"
        )


def check_prefill(
    model: nn.Module,
    prefill: PrefillBudget | None,
    verify: Verify | None,
    group: Group | None,
) -> None:
    """ValueError for options and models that sparse prefill does not work with."""
    if prefill is None:
        return
    if not isinstance(prefill, PrefillBudget):
        raise ValueError(f"prefill must be None or a saap.PrefillBudget; got {prefill!r}")
    if verify is not None:
        raise ValueError(
            "prefill must be None beside verify, whose tokens are those of exact attention; got "
            f"{prefill}"
        )
    if group is not None:
        raise ValueError(
            f"prefill must be None where the context is split over a group; got {prefill}"
        )
    if model.device.type != "cpu":
        raise ValueError(
            f"prefill must be None on {model.device.type}, where prompts are read densely; got "
            f"{prefill}"
        )


def check_kinds(index: object, budget: object) -> None:
    """ValueError for what is no index, or no budget."""
    if index is not None and not isinstance(index, TrainedIndex):
        raise ValueError(
            f"index must be None or a TrainedIndex, as TrainedIndex.load gives; got {index!r}"
        )
    if budget is not None and not isinstance(budget, Budget):
        raise ValueError(f"budget must be a saap.Budget, or None; got {budget!r}")


def check_layers_of(budget: Budget, n_layers: int) -> None:
    """ValueError for a budget that names layers which a model of so many does not have."""
    if any(n >= n_layers for n in budget.dense_layers):
        raise ValueError(f"dense_layers must be in 0..{n_layers - 1}; got {budget.dense_layers}")
    named = budget.layer_importance
    if named is not None and len(named) != n_layers:
        raise ValueError(
            f"layer_importance must have {n_layers} numbers, one for each layer; got {len(named)}"
        )
