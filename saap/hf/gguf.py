"""Models and tokenizers out of `.gguf` files, de-quantised by transformers."""

import contextlib
import functools
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from transformers import modeling_gguf_pytorch_utils as reader

from .gguf_header import Header, read_header
from .gguf_rope import set_rope_scaling

EXTRA = 'pip install "saap[gguf]"'
TOKENS = "tokenizer.ggml.tokens"


def load_gguf(path: str | Path, dtype: torch.dtype):
    """The model of a GGUF file, in `dtype`; it can be saved and moved like any other.

    Raises ValueError for a file that is damaged or that transformers cannot read, ImportError
    naming the extra for what is not installed.
    """
    header = checked_header(path, needs=("gguf", "accelerate"))
    options = {"gguf_file": header.path.name}
    with one_line_errors(header, "no model"), quiet():
        config = transformers.AutoConfig.from_pretrained(header.path.parent, **options)
        set_rope_scaling(config, header)
        config.vocab_size = vocabulary(header, config.vocab_size)
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            header.path.parent,
            config=config,
            dtype=dtype,
            output_loading_info=True,
            quantization_config=transformers.GgufConfig(dequantize=True),
            **options,
        )
    check_weights(header, model, found)
    return as_plain(model)


def load_gguf_tokenizer(path: str | Path):
    """The tokenizer of a GGUF file, with its chat template if it has one."""
    header = checked_header(path, needs=("gguf",))
    if not header.metadata.get(TOKENS):
        raise ValueError(f"{header.path}: a GGUF file must have a tokenizer; got no {TOKENS}")
    with one_line_errors(header, "no tokenizer"), quiet():
        return transformers.AutoTokenizer.from_pretrained(
            header.path.parent, gguf_file=header.path.name
        )


def checked_header(path: str | Path, *, needs: tuple[str, ...]) -> Header:
    """The header of a file that is whole, of a kind that transformers reads."""
    header = read_header(Path(path).expanduser())
    missing = [name for name in needs if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"{header.path}: to read GGUF files, {EXTRA} ({', '.join(missing)})")
    from gguf import GGML_QUANT_SIZES

    size, end = header.path.stat().st_size, header.end(GGML_QUANT_SIZES)
    if size < end:
        raise ValueError(
            f"{header.path}: must have {end:,} bytes; got {size:,} (truncated: copy it again)"
        )
    parts = header.metadata.get("split.count", 1)
    if parts > 1:
        raise ValueError(
            f"{header.path}: must be one whole file; got a part of {parts}: merge them with "
            "llama-gguf-split --merge"
        )
    return header


def vocabulary(header: Header, stated: int) -> int:
    """Size of the vocabulary, from the embedding: a file without tokenizer need not state it."""
    embedding = header.tensors.get("token_embd.weight")
    return stated if embedding is None else embedding.shape[0]


def check_weights(header: Header, model, found: dict) -> None:
    """ValueError for weights that are missing (they would be random) or not finite."""
    missing = sorted(found["missing_keys"]) + sorted(map(str, found["mismatched_keys"]))
    if missing:
        raise ValueError(
            f"{header.path}: must have all weights of a {model.config.model_type}; lacks "
            f"{len(missing)}, first {missing[0]}"
        )
    for name, weight in model.named_parameters():
        if not bool(torch.isfinite(weight).all()):
            raise ValueError(
                f"{header.path}: weights must be finite; got NaN or infinity in {name} (damaged: "
                "copy it again)"
            )


def as_plain(model):
    """The model without the marks of a quantised one, which would forbid saving and moving it."""
    model.hf_quantizer = None
    for owner, mark in (
        (model, "is_quantized"),
        (model, "quantization_method"),
        (model.config, "quantization_config"),
    ):
        if mark in vars(owner):
            delattr(owner, mark)
    return model


@contextlib.contextmanager
def one_line_errors(header: Header, what: str) -> Iterator[None]:
    """Whatever transformers raises on a file, as one ValueError that names the file."""
    try:
        yield
    except ImportError as error:
        raise ImportError(f"{header.path}: to read GGUF files, {EXTRA} ({error})") from error
    except MemoryError:
        raise
    except Exception as error:  # of dozens of kinds: KeyError, RuntimeError, NotImplementedError
        if isinstance(error, ValueError) and str(error).startswith(str(header.path)):
            raise
        line = (str(error).strip().splitlines() or [""])[0]
        raise ValueError(
            f"{header.path}: {what} of architecture {header.architecture!r} could be loaded "
            f"({type(error).__name__}: {line})"
        ) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """While open: no progress bar, which no setting turns off, and no repeated work.

    transformers reads the whole vocabulary of a file once for the configuration and again for the
    weights, and lists the names of an architecture's tensors once a module.
    """
    import gguf

    with contextlib.ExitStack() as stack:
        for owner, name, other in (
            (reader, "tqdm", lambda iterable, **_: iterable),
            (gguf, "GGUFReader", functools.cache(gguf.GGUFReader)),
            (gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map)),
        ):
            if hasattr(owner, name):
                stack.callback(setattr, owner, name, getattr(owner, name))
                setattr(owner, name, other)
        yield
