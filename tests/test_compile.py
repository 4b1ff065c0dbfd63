"""Compiled models and functions compute what they compute uncompiled: the same tokens."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import saap
from saap import hf
from saap.budget import Budget
from saap.kv import KVStore

from .test_generate import FULL, SMALL, generated, make, prompt, random_index
from .test_threads import INPUTS, decoded

pytestmark = pytest.mark.many_steps

HAS_COMPILER = shutil.which("g++") is not None or shutil.which("clang++") is not None
INDUCTOR = pytest.param(
    "inductor",
    marks=[pytest.mark.slow, pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler")],
)


@pytest.fixture(autouse=True)
def forgotten():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("family", "before"),
    [("llama", True), ("gemma3", False)],
    ids=["llama, used before", "gemma3, first in the block"],
)
@pytest.mark.parametrize("backend", ["eager", INDUCTOR])
def test_a_compiled_model_decodes_the_same_tokens(family, backend, before):
    model = make(family)
    index, tokens = random_index(model), prompt(1, 60)
    dense = decoded(model, tokens, None)
    with saap.attached(model, index, SMALL, method="blend") as saap_model:
        expected = decoded(model, tokens, saap_model.cache())
    compiled = torch.compile(model, backend=backend)
    if before:
        assert decoded(compiled, tokens, None) == dense
    with saap.attached(model, index, SMALL, method="blend") as saap_model:
        assert decoded(compiled, tokens, saap_model.cache()) == expected
        assert decoded(compiled, tokens, None) == dense
        assert decoded(compiled, tokens, saap_model.cache()) == expected
        assert decoded(model, tokens, saap_model.cache()) == expected
        left = saap_model.cache()
    assert decoded(compiled, tokens, None) == dense
    with pytest.raises(ValueError, match="must be used by its attached model"):
        decoded(compiled, tokens, left, n=1)
    assert not hf.attention._threads.running


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_generate_of_a_compiled_model(family):
    model = make(family)
    expected = generated(model, INPUTS, max_new_tokens=8)
    index = random_index(model)
    model.compile(backend="eager")
    with saap.attached(model, index, FULL, method="blend") as saap_model:
        found = generated(model, INPUTS, max_new_tokens=8, **hf.over(saap_model.cache()))
        assert torch.equal(found, expected)
        assert torch.equal(generated(model, INPUTS, max_new_tokens=8), expected)


def test_a_handler_is_asked_whatever_was_compiled_before():
    model = make("llama")
    compiled = torch.compile(model, backend="eager")
    asked = []

    def handler(call):
        asked.append(call.layer)
        shape = call.q_rope.shape
        return torch.zeros(shape), torch.zeros(shape[:3])

    with torch.no_grad(), saap.attached(model, None, Budget.default()):
        plain = compiled(prompt(1, 20)).logits
    with torch.no_grad(), hf.attention.routed(model, handler):
        handled = compiled(prompt(1, 20)).logits
    with torch.no_grad():
        again = compiled(prompt(1, 20)).logits
    assert asked == [0, 1]
    assert not torch.equal(handled, plain)
    torch.testing.assert_close(again, plain)


def test_a_store_in_a_compiled_function():
    generator = torch.Generator().manual_seed(0)
    k, v, q = (torch.randn(1, h, 40, 16, generator=generator) for h in (2, 2, 4))

    def steps(store):
        store.append(k[:, :, :30], v[:, :, :30], k[:, :, :30])
        out = store.attend(q[:, :, :30], q[:, :, :30])[0].sum()
        for n in range(30, 40):
            one = slice(n, n + 1)
            store.append(k[:, :, one], v[:, :, one], k[:, :, one])
            out = out + store.attend(q[:, :, one], q[:, :, one])[0].sum()
        return out

    def store():
        return KVStore(None, Budget(max_tokens=8, n_sink=2, window=8))

    compiled = torch.compile(steps, backend="eager")
    torch.testing.assert_close(compiled(store()), steps(store()))


SCRIPT = """
import sys, torch, saap

def attend(q, k, v, starts, lengths, impl):
    out, lse = saap.attend_ranges(2 * q, k, v, starts, lengths, softcap=20.0, impl=impl)
    return out + 1, lse

torch.manual_seed(0)
for impl in ("numba", "reference", None):
    compiled = torch.compile(attend, backend=sys.argv[1], fullgraph=True)
    for n in (40, 77, 130):
        for dtype in (torch.float32, torch.bfloat16):
            q, k, v = (torch.randn(s, dtype=dtype) for s in ((2, 4, 16), *[(2, 2, n, 16)] * 2))
            starts = torch.zeros(2, 2, 1, dtype=torch.int32)
            given = q, k, v, starts, starts + n - 3, impl
            for a, b in zip(compiled(*given), attend(*given)):
                assert a.dtype == b.dtype and a.shape == b.shape
                torch.testing.assert_close(a, b)
    try:
        compiled(q, k, v, starts, starts + n + 1, impl)
    except ValueError as error:
        assert "must be at most N" in str(error)
    else:
        raise AssertionError("ranges beyond the rows were taken")
torch.library.opcheck(
    torch.ops.saap.attend_ranges.default,
    (q.float(), k.float(), v.float(), starts, starts + 5, None, None, None),
    test_utils=("test_schema", "test_faketensor"),
)
"""


@pytest.mark.parametrize("backend", ["eager", INDUCTOR])
def test_attend_ranges_in_a_compiled_function(backend):
    # In a process of its own: shapes in annotations are checked in ours, by code that no graph
    # can hold.
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, backend], capture_output=True, text=True,
        cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
