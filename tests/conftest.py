"""Shared fixtures: tiny random models, and captured tensors of the reference model."""

import os

import hypothesis
import jaxtyping
import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Processes of `pytest -n` share the cores, and what they start does, too.
together = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if together > 1:
    threads = max(1, (os.cpu_count() or 1) // together)
    for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
        os.environ.setdefault(name, str(threads))
    torch.set_num_threads(threads)

# Annotations of shapes and dtypes hold in every call of a test (jaxtyping checks by beartype), but
# in those marked `bad_input`, where the function itself has to refuse, and in files marked
# `many_steps`, which would take half as long again. Triton's kernels are no Python, so their
# modules are not among these.
TYPED = """
saap.budget saap.hf.layerwise saap.kv saap.masses saap.methods saap.partition saap.rope
saap.selector
saap.index saap.kernels.attention.api saap.kernels.attention.merge saap.kernels.pages.api
""".split()
jaxtyping.install_import_hook(TYPED, "beartype.beartype")

from saap import hf
from saap.eval import reference
from saap.eval.tasks.answering import encode
from saap.kv import KVStore
from saap.training import train

# Every selection of every test is checked: no rows twice, none outside the middle.
KVStore.debug = True

# The same examples everywhere: a failure is one that anybody can repeat.
hypothesis.settings.register_profile("saap", derandomize=True, deadline=None)
hypothesis.settings.load_profile("saap")


def _unchecked_if(unchecked: bool):
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", unchecked or before)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


@pytest.fixture(autouse=True, scope="module")
def annotations_of_file(request):
    """Not checked in files of many steps, nor while fixtures of such a file are made."""
    yield from _unchecked_if(request.node.get_closest_marker("many_steps") is not None)


@pytest.fixture(autouse=True)
def annotations(request):
    """Not checked where a test gives what the function under test has to refuse by itself."""
    yield from _unchecked_if(request.node.get_closest_marker("bad_input") is not None)


SMALL = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 512, "pad_token_id": 0,
}  # fmt: skip


def random_model(family: str, **overrides):
    """A randomly initialised model of a Hugging Face family, small enough for tests."""
    import transformers

    config = transformers.AutoConfig.for_model(family, **{**SMALL, **overrides})
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="session")
def tiny_model():
    return random_model("llama")


@pytest.fixture(scope="session")
def tiny_tokens():
    return torch.randint(1, 96, (6, 300), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def tiny_index(tiny_model, tiny_tokens):
    return train(tiny_model, tiny_tokens, nlist=16, steps=20, hidden=16, window=32, baselines=True)


@pytest.fixture(scope="session")
def reference_model():
    return hf.load_model(reference.FOLDER)


@pytest.fixture(scope="session")
def reference_tokenizer():
    return hf.load_tokenizer(reference.FOLDER)


@pytest.fixture(scope="session")
def reference_index(reference_model, reference_tokenizer):
    text = reference.split_held_out()[0]
    tokens = [encode(reference_tokenizer, text[i * 4096 : i * 4096 + 1500]) for i in range(8)]
    return train(reference_model, tokens, nlist=32, steps=150, hidden=32, baselines=True)


@pytest.fixture(scope="session")
def captured(reference_model, reference_tokenizer):
    """What the reference model saw of 1024 tokens, the last 8 of them as queries."""
    text = reference.split_held_out()[1]
    tokens = encode(reference_tokenizer, text[:1200])[:1024]
    return hf.read_context(reference_model, tokens, n_queries=8)
