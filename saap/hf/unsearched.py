"""Layers of a cache that are not searched: sliding windows, and states of other layers.

Both are transformers' own. A window holds keys and values of the latest tokens. A layer without
attention (linear attention, a convolution) has a state of one size whatever the context. Tokens
cannot be taken out of it again, but for those of a convolution that was told to record the past.
"""

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, CacheLayerMixin

from saap.context_file import NO_ROWS

from .cache_argument import over
from .families import ModelLayer
from .models import NOTHING


def holds_nothing(layer) -> bool:
    return type(layer) is DYNAMIC_LAYER_TYPE_MAPPING.get(NOTHING)


def is_state(layer) -> bool:
    """Whether a layer keeps a state and nothing else."""
    return not (isinstance(layer, CacheLayerMixin) or holds_nothing(layer))


def keeps_state(layer) -> bool:
    return hasattr(layer, "recurrent_states")


def can_be_cropped(layer) -> bool:
    """Whether tokens can be taken out of a layer that keeps a state."""
    return layer.record_past and getattr(layer, "is_croppable", False)


def states_of(layer) -> dict[str, Tensor]:
    """The tensors of a state, by the name of their kind and their number."""
    kinds = {name: getattr(layer, name) for name in ("conv_states", "recurrent_states")}
    return {
        f"{name}.{number}": state
        for name, states in kinds.items()
        for number, state in states.items()
        if state is not None
    }


def state_bytes(layer) -> int:
    """Bytes of a layer's state; 0 without one."""
    return sum(t.nbytes for t in states_of(layer).values()) if keeps_state(layer) else 0


def nbytes(layer) -> int:
    """Bytes that a layer holds."""
    if holds_nothing(layer):
        return 0
    if is_state(layer):
        return state_bytes(layer)
    return layer.keys.nbytes + layer.values.nbytes if layer.is_initialized else 0


def saved(layer) -> tuple[dict, dict[str, Tensor]]:
    """What a header says of a layer, and its tensors."""
    if holds_nothing(layer):
        return {NO_ROWS: True}, {}
    if is_state(layer):
        return {"state": True}, saved_state(layer)
    facts = {"cumulative_length": layer.cumulative_length}
    return facts, {"keys": layer.keys, "values": layer.values}


def saved_state(layer) -> dict[str, Tensor]:
    """The tensors of a layer's state; none without one."""
    if not keeps_state(layer):
        return {}
    states = states_of(layer)
    if layer.record_past:  # of a past that can be cropped, what the next token needs
        for number, size in layer.conv_kernel_size.items():
            name = f"conv_states.{number}"
            if name in states:
                latest = states[name][..., -size:]
                states[name] = nn.functional.pad(latest, (size - latest.shape[-1], 0))
    return {f"state.{name}": t for name, t in states.items()}


def restore(
    where: str, layer, facts: dict, tensors: dict[str, Tensor], like, n_tokens: int
) -> None:
    """Put what `saved` gave of `n_tokens` into a new layer; `like`: the layer after any other
    forward.

    Raises ValueError that says `where` for a layer of another kind, and for a window or a state of
    another size.
    """
    if (is_state(layer), holds_nothing(layer)) != ("state" in facts, NO_ROWS in facts):
        raise ValueError(f"{where} must be of the kind that the model has; got another")
    if holds_nothing(layer):
        return
    if is_state(layer):
        restore_state(where, layer, tensors, like)
        return
    wanted, found = ([t.shape[1], t.shape[3], t.dtype] for t in (like.keys, tensors["keys"]))
    if wanted != found:
        raise ValueError(f"{where} must have KV heads, dimensions and dtype {wanted}; got {found}")
    least = min(n_tokens, layer.sliding_window - 1)
    held = facts["cumulative_length"], tensors["keys"].shape[2]
    if held[0] != n_tokens or not least <= held[1] <= n_tokens:
        raise ValueError(
            f"{where} must have seen {n_tokens} tokens and hold the last {least} of them; got "
            f"{held[0]} and {held[1]}: it was altered"
        )
    layer.lazy_initialization(tensors["keys"], tensors["values"])
    layer.keys, layer.values = tensors["keys"], tensors["values"]
    layer.cumulative_length = facts["cumulative_length"]
    layer.is_initialized = True


def restore_state(where: str, layer, tensors: dict[str, Tensor], like) -> None:
    """Put what `saved_state` gave into a new layer, if it keeps a state; `like` and errors as for
    `restore`."""
    if not keeps_state(layer):
        return
    own = {n.removeprefix("state."): t for n, t in tensors.items() if n.startswith("state.")}
    wanted, found = (
        {n: (tuple(t.shape), t.dtype) for n, t in states.items()}
        for states in (states_of(like), own)
    )
    if wanted != found:
        raise ValueError(f"{where} must have a state of {wanted}; got {found}")
    for name, state in own.items():
        kind, number = name.split(".")
        layer.lazy_initialization(**{kind: state}, state_idx=int(number))
        getattr(layer, kind)[int(number)].copy_(state)
        layer.has_previous_state[int(number)] = True


@torch.no_grad()
def after_a_token(model: nn.Module, layers: list[ModelLayer]) -> list:
    """Layers of a cache after one token, to compare with; empty ones if all are only searched."""
    cache = DynamicCache(config=model.config.get_text_config())
    if not all(layer.is_full and not layer.has_state for layer in layers):
        token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        model(token, **over(cache), use_cache=True)
    return cache.layers
