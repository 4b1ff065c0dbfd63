"""Requests served by vLLM with Saap and without: with all pages the tokens are the same."""

import importlib.util
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import llvmlite.binding
import numpy as np
import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed (make vllm)", allow_module_level=True)

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
MODEL = os.environ.get("SAAP_VLLM_MODEL") or str(ROOT / "eval" / "reference" / "files")
WHOLE, FEW = "visited=1.0,dense_below=0", "visited=0.05,window=1,sinks=1,dense_below=0"


def served(scenario: dict, options: str | None, **environment) -> dict:
    settings = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "INFO",
        "OMP_NUM_THREADS": "1",
        "SAAP_VLLM": options or "",
    }
    done = subprocess.run(
        [sys.executable, str(HERE / "scenario.py"), json.dumps(scenario)],
        env=os.environ | settings | environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    lines = [x for x in done.stdout.splitlines() if x.startswith("RESULT ")]
    assert len(lines) == 1, (done.stdout + done.stderr)[-4000:]
    return json.loads(lines[-1].removeprefix("RESULT ")) | {"log": done.stdout + done.stderr}


def prompts(lengths, *, vocabulary=256, shared=0, every=0):
    """Repetitive sequences, half of them with a common beginning; one comes `every` so many
    steps."""
    rng = np.random.default_rng(0)
    common = rng.integers(2, vocabulary, 64)
    found = []
    for number, n in enumerate(lengths):
        own = np.tile(rng.integers(2, vocabulary, 97), n // 97 + 1)[:n]
        if number % 2 and n > shared:
            own[:shared] = np.tile(common, shared // 64 + 1)[:shared]
        found.append({"ids": own.tolist(), "step": number * every})
    return found


def tokens(result: dict) -> dict:
    return {name: [o["tokens"] for o in own] for name, own in result["outputs"].items()}


MIXED = {
    "model": MODEL,
    "engine": {"max_model_len": 8192, "max_num_batched_tokens": 512, "max_num_seqs": 8},
    "requests": prompts([7000, 100, 2500, 900, 1500, 33, 4000, 640], shared=512, every=3),
    "new": 24,
}


@pytest.fixture(scope="module")
def stock():
    return served(MIXED, None)


def test_all_pages_are_stock_in_a_mixed_batch(stock):
    """Chunked prompts between decodes, a shared beginning, requests that come and go."""
    whole = served(MIXED, WHOLE)
    assert tokens(whole) == tokens(stock)
    assert whole["counts"]["vllm:prefix_cache_hits"] > 0
    assert "Saap decodes sparsely" in whole["log"]
    assert "Saap" not in stock["log"]


def test_few_pages_are_not_stock(stock):
    assert tokens(served(MIXED, FEW)) != tokens(stock)


def test_a_choice_that_fails_leaves_the_step_dense(stock):
    own = served(MIXED | {"no_choice": True}, FEW)
    assert tokens(own) == tokens(stock)
    assert own["log"].count("Saap leaves a step dense: nothing can be chosen") == 1


def test_logprobs_are_those_of_stock():
    scenario = MIXED | {"requests": MIXED["requests"][:4], "logprobs": 1}
    plain, whole = served(scenario, None), served(scenario, WHOLE)
    assert tokens(whole) == tokens(plain)
    for name, outputs in plain["outputs"].items():
        for own, other in zip(outputs, whole["outputs"][name], strict=True):
            difference = np.abs(np.subtract(own["logprobs"], other["logprobs"])).max()
            assert difference < 1e-3, difference  # 2e-5 measured


def test_preempted_requests_are_stock():
    scenario = {
        "model": MODEL,
        "engine": {"max_model_len": 4096, "max_num_batched_tokens": 1024, "block_size": 32,
                   "num_gpu_blocks_override": 160, "max_num_seqs": 8},
        "requests": prompts([1500, 1200, 1180, 1100], every=0),
        "new": 200,
    }  # fmt: skip
    plain, whole = served(scenario, None), served(scenario, WHOLE)
    assert tokens(whole) == tokens(plain)
    assert whole["counts"]["vllm:num_preemptions"] > 0


def test_two_samples_of_a_prompt_are_stock():
    """Prompts are not cut: with a seed of its own that fails in vLLM 0.32 on a CPU."""
    scenario = {
        "model": MODEL,
        "engine": {"max_model_len": 4096, "max_num_batched_tokens": 8192},
        "requests": prompts([2500, 100, 900, 1500]),
        "new": 24,
        "n": 2,
        "temperature": 0.7,
    }
    assert tokens(served(scenario, WHOLE)) == tokens(served(scenario, None))


def test_two_processes_are_stock():
    scenario = MIXED | {"engine": MIXED["engine"] | {"tensor_parallel_size": 2}}
    scenario["requests"] = scenario["requests"][:5]
    bound = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    assert tokens(served(scenario, WHOLE, **bound)) == tokens(served(scenario, None, **bound))


def test_aborted_requests_leave_no_trace(stock):
    own = served(MIXED | {"aborts": {"0": 30, "4": 40}}, WHOLE)
    expected = {name: t for name, t in tokens(stock).items() if name not in ("0", "4")}
    assert {name: t for name, t in tokens(own).items() if name in expected} == expected


ROWS = {
    "model": MODEL,
    "engine": {"max_model_len": 2048, "max_num_batched_tokens": 256, "max_num_seqs": 4,
               "block_size": 16, "num_gpu_blocks_override": 300},
    "requests": prompts([1400, 900, 700, 640, 33], shared=256, every=3),
    "new": 12,
}  # fmt: skip


@pytest.mark.parametrize("layout", ["LBNHC", "LBHNC"])
def test_all_rows_are_stock_in_the_way_of_a_gpu(layout):
    """The GPU's way of decoding, on a stand-in for FlashAttention; fewer rows differ."""
    environment = {"PLAIN_LAYOUT": layout}
    plain = served(ROWS | {"backend": "plain.PlainBackend"}, None, **environment)
    own = ROWS | {"backend": "plain.SaapPlainBackend"}
    three_rows = "visited=0.002,window=1,sinks=0,dense_below=0"
    whole, few = (served(own, options, **environment) for options in (WHOLE, three_rows))
    assert tokens(whole) == tokens(plain)
    assert tokens(few) != tokens(plain)
    assert whole["counts"]["vllm:prefix_cache_hits"] > 0
    for result in (whole, few):
        assert "Saap decodes sparsely" in result["log"]
        assert "Saap leaves" not in result["log"]


@pytest.mark.skipif(
    platform.machine() == "x86_64" and not llvmlite.binding.get_host_cpu_features().get("avx512f"),
    reason="vLLM's own fp8 cache needs AVX-512 on a CPU of this kind",
)
def test_a_quantised_cache_is_left_dense():
    scenario = MIXED | {"requests": MIXED["requests"][:3]}
    scenario["engine"] = scenario["engine"] | {"kv_cache_dtype": "fp8"}
    plain, own = served(scenario, None), served(scenario, FEW)
    assert tokens(own) == tokens(plain)
    assert own["log"].count("the KV cache must not be quantised; got fp8") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [("visited=2", "visited must be above 0 and at most 1; got 2.0"), ("nprobe=3", "must name")],
)
def test_a_wrong_option_stops_the_start(options, message):
    with pytest.raises(AssertionError, match=message):
        served(MIXED, options)
