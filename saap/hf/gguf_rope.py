"""Copies a GGUF file's RoPE scaling into the configuration, because transformers leaves it out.

Without it such a model loads, but is wrong beyond the length that it was first trained at.
"""

import copy

import numpy as np
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .gguf_header import Header

LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""Of all Llama 3.1, 3.2 and 3.3. A file holds only what follows from them and from the factor."""

UNREADABLE = ("rope_factors_long.weight", "rope_factors_short.weight")


def set_rope_scaling(config, header: Header) -> None:
    """Write the file's RoPE scaling into `config`. ValueError for an unknown kind."""
    kind = header.own.get("rope.scaling.type", "none")
    factor = header.own.get("rope.scaling.factor", header.own.get("rope.scale_linear", 1.0))
    parameters = full_attention_rope(config)
    if parameters is None or parameters.get("rope_type", "default") != "default":
        return
    if "rope_freqs.weight" in header.tensors:
        parameters.update(llama3_rope(config, header))
    elif any(name in header.tensors for name in UNREADABLE) or kind not in ("none", "linear"):
        got = kind if kind != "none" else "longrope"
        raise ValueError(
            f"{header.path}: RoPE scaling of a GGUF file must be none, linear or that of Llama 3; "
            f"got {got!r}"
        )
    elif factor != 1.0:
        parameters.update(rope_type="linear", factor=float(factor))


def full_attention_rope(config) -> dict | None:
    """The settings that scaling applies to: if they differ by layer, those of full attention."""
    found = getattr(config, "rope_parameters", None)
    return found.get("full_attention", found) if found else None


def llama3_rope(config, header: Header) -> dict:
    """The settings of Llama 3 whose frequencies are those of the file."""
    info = header.tensors["rope_freqs.weight"]
    divisors = np.fromfile(
        header.path, "<f4", count=info.shape[-1], offset=header.data_start + info.offset
    )
    settings = {"rope_type": "llama3", "factor": float(divisors.max()), **LLAMA3}
    tried = copy.deepcopy(config)
    full_attention_rope(tried).update(settings)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](tried)
    width = 2 * len(divisors)
    plain = tried.rope_parameters["rope_theta"] ** -(torch.arange(0, width, 2).double() / width)
    expected = plain / torch.from_numpy(divisors).double()
    if len(scaled) != len(expected) or not torch.allclose(scaled.double(), expected, rtol=1e-3):
        raise ValueError(
            f"{header.path}: rope_freqs.weight must be the frequencies of Llama 3 "
            f"({', '.join(f'{k}={v:g}' for k, v in LLAMA3.items())}); got others"
        )
    return settings
