"""Shared fixtures: tiny random models, and captured tensors of the reference model."""

import os

import hypothesis
import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from saap import hf
from saap.eval import reference
from saap.eval.tasks import attention
from saap.eval.tasks.answering import encode
from saap.training import train

# The same examples everywhere: a failure is one that anybody can repeat.
hypothesis.settings.register_profile("saap", derandomize=True, deadline=None)
hypothesis.settings.load_profile("saap")

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
    """`QueryCapture` of the reference model on 1024 tokens with 8 queries."""
    text = reference.split_held_out()[1]
    return attention.capture(reference_model, encode(reference_tokenizer, text[:1200])[:1024], 8)
