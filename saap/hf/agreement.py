"""Checks that all ranks of a group run the same: when a model is attached, and at each forward."""

import dataclasses
import hashlib

import torch
from torch import Tensor

from saap import __version__
from saap.distributed import Group

from .models import describe


def check(saap_model) -> None:
    """GroupError on all ranks, naming what differs; ValueError for what a group cannot do yet."""
    if saap_model.verify is not None:
        raise ValueError("verify must be None with a group; got verify: it is not built for one")
    method = saap_model.method
    if method.name not in ("saap", "dense"):
        raise ValueError(
            "method must be saap or dense with a group, whose choice over several ranks is built; "
            f"got {method.name!r}"
        )
    what = {"version of saap and torch": f"{__version__} and {torch.__version__}"}
    model = describe(saap_model.model)
    shape = "x".join(
        str(model[n]) for n in ("num_layers", "num_heads", "num_kv_heads", "head_dim")
    )
    digest = hashlib.sha256(repr(model).encode()).hexdigest()[:12]
    dtype = str(saap_model.model.dtype).removeprefix("torch.")
    what["model"] = f"{model['model_type']} {shape} {dtype} of weights {digest}"
    for field in dataclasses.fields(saap_model.budget):
        what[field.name + " of the budget"] = repr(getattr(saap_model.budget, field.name))
    what["kv_dtype"] = str(saap_model.kv_dtype)
    index = "none" if method.index is None else method.index.fingerprint
    what["method"] = f"{method.name} {getattr(method, 'search_options', '')}"
    what["index"] = index[:12]
    saap_model.group.agree(what, saap_model.model.device)


def check_tokens(group: Group, tokens: Tensor) -> None:
    """GroupError on all ranks, if they were given different tokens or embeddings."""
    content = tokens.detach().cpu().contiguous()
    digest = hashlib.sha256(content.reshape(-1).view(torch.uint8).numpy()).hexdigest()[:12]
    kind = "tokens" if tokens.ndim == 2 else "embeddings"
    shown = f"{tokens.shape[1]} {kind} of digest {digest}"
    group.agree({"text": shown}, tokens.device)
