"""Every configuration that the Triton launcher can choose, compiled without a GPU.

Fails on spills, on shared memory above the chip's limit, and where registers or shared memory
let fewer programs onto an SM than the plan counts on. The default run takes a few of them; all
of them are marked slow, and `python -m tests.kernels.test_aot [sm_90 ...]` prints their table.
"""

import itertools
import re
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

triton = pytest.importorskip("triton")

from saap.kernels.attention import triton as backend  # noqa: E402
from saap.kernels.attention.triton_plan import Device, Plan, make_plan  # noqa: E402
from saap.kernels.codes import Codes, QueryMap, coordinates_for  # noqa: E402
from saap.kernels.codes import triton as codes_backend  # noqa: E402
from saap.kernels.codes.triton_coding import encoding  # noqa: E402
from saap.kernels.pages import PageCodes  # noqa: E402
from saap.kernels.pages import triton as pages_backend  # noqa: E402
from saap.kernels.rest import Moments, Scored  # noqa: E402
from saap.kernels.rest import triton as rest_backend  # noqa: E402

pytestmark = pytest.mark.skipif(
    backend.INTERPRETED, reason="the interpreter replaces the compiler"
)

KIB = 1024


class Chip(NamedTuple):
    sms: int
    shared_per_block: int
    shared_per_sm: int


CHIPS = {
    80: Chip(108, 163 * KIB, 164 * KIB),
    90: Chip(132, 227 * KIB, 228 * KIB),
    100: Chip(148, 227 * KIB, 228 * KIB),
}
REGISTERS_PER_SM = 65536
WARPS_PER_SM = 64
TRITON_TYPES = {
    torch.uint8: "u8",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.int64: "i64",
    torch.int16: "i16",
    torch.float8_e4m3fn: "fp8e4nv",
}


class Case(NamedTuple):
    capability: int
    q_dtype: torch.dtype
    k_dtype: torch.dtype
    head_dim: int
    n_ranges: int
    mode: str
    softcap: float | None
    rows: int = 8192

    def __str__(self) -> str:
        kind = TRITON_TYPES[self.q_dtype]
        if self.k_dtype != self.q_dtype:
            kind += f"/{TRITON_TYPES[self.k_dtype]}"
        ranges = "packed" if self.n_ranges > 1 else "single"
        ranges = "many" if self.n_ranges > 512 else ranges
        cap = "cap" if self.softcap else "nocap"
        name = f"sm_{self.capability}-{kind}-{self.head_dim}-{ranges}-{self.mode}-{cap}"
        return name if self.rows == 8192 else f"{name}-{self.rows}"


class Usage(NamedTuple):
    """One kernel: registers a thread, bytes of shared memory and of stack, programs an SM.

    The kernels hold no arrays, so that a stack is spilled registers.
    """

    kernel: str
    registers: int
    shared: int
    stack: int
    per_sm: int


def all_cases() -> list[Case]:
    halves = (torch.float16, torch.bfloat16)
    eighths = (torch.int8, torch.float8_e4m3fn)
    dtypes = [(t, t) for t in (*halves, torch.float32)] + list(itertools.product(halves, eighths))
    return [
        Case(capability, q, k, head_dim, n_ranges, mode, softcap)
        for capability, (q, k), head_dim, n_ranges, mode, softcap in itertools.product(
            CHIPS, dtypes, (64, 96, 128, 256), (1, 8), ("stream", "group"), (None, 30.0)
        )
        if not (capability == 80 and k == torch.float8_e4m3fn)
    ]


def few_cases() -> list[Case]:
    half, single, bf16 = torch.float16, torch.float32, torch.bfloat16
    int8, fp8 = torch.int8, torch.float8_e4m3fn
    few = [Case(c, bf16, bf16, 128, 8, "stream", 30.0) for c in CHIPS]
    few += [Case(c, bf16, bf16, 256, 8, "stream", None) for c in CHIPS]
    few += [Case(c, bf16, int8, 128, 8, "stream", None) for c in CHIPS]
    few += [Case(90, bf16, bf16, dim, 8, "stream", 30.0) for dim in (64, 96)]
    few += [Case(90, bf16, bf16, 128, 1, "stream", None)]
    few += [Case(90, half, half, 128, 1, "group", None)]
    few += [Case(c, bf16, bf16, dim, 4098, "stream", None) for c, dim in ((80, 128), (90, 64))]
    few += [Case(90, bf16, bf16, dim, 4098, "stream", 30.0) for dim in (128, 256)]
    few += [Case(90, single, single, 128, 8, "stream", None)]
    few += [Case(90, bf16, fp8, 128, 8, "stream", None)]
    # Strides past 2^31.
    return [*few, Case(90, bf16, bf16, 128, 8, "stream", None, rows=2**22)]


ALL, FEW = all_cases(), few_cases()


def meta(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launches_of(case: Case) -> tuple[Plan, list[backend.Launch]]:
    """What the launcher would launch for Llama-3-8B's heads, on tensors without storage."""
    batch, q_heads, kv_heads, rows = 4, 32, 8, case.rows

    q = meta(batch, q_heads, case.head_dim, dtype=case.q_dtype)
    k = meta(batch, kv_heads, rows, case.head_dim, dtype=case.k_dtype)
    starts = meta(batch, kv_heads, case.n_ranges, dtype=torch.int32)
    scale = None
    if case.k_dtype != case.q_dtype:
        scale = meta(batch, kv_heads, rows, dtype=torch.float32)
    device = Device(case.capability, CHIPS[case.capability].sms)
    plan = make_plan(device, q, k, starts, mode=case.mode)
    workspace = backend.make_workspace(q, k, starts, plan=plan)
    tensors = (q, k, k, starts, starts, scale, scale)
    return plan, list(backend.launches(*tensors, workspace, sm_scale=0.1, softcap=case.softcap))


def compile_launch(launch: backend.Launch, capability: int):
    """Compiles with the types and hints that the just-in-time launch would derive."""
    signature, constants, hints = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        specialise = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None:
            kind = "constexpr"
        elif isinstance(value, torch.Tensor):
            kind = "*" + TRITON_TYPES[value.dtype]
        elif isinstance(value, float):
            kind = "fp32"
        elif value == 1 and specialise:
            kind = "constexpr"
        else:
            kind = "i32" if abs(value) < 2**31 else "i64"
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[(index,)] = value
        elif kind[0] == "*" or (kind[0] == "i" and specialise and value % 16 == 0):
            hints[(index,)] = [["tt.divisibility", 16]]
    source = triton.compiler.ASTSource(launch.kernel, signature, constants, hints)
    target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return triton.compile(source, target=target, options=launch.options)


def usage_of(launch: backend.Launch, capability: int, folder: Path) -> Usage:
    compiled = compile_launch(launch, capability)
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    command = [tool, "--dump-resource-usage", cubin]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", report).groups())
    chip, warps = CHIPS[capability], launch.options["num_warps"]
    shared = compiled.metadata.shared
    by_registers = REGISTERS_PER_SM // (-(-registers // 8) * 8 * 32 * warps)
    by_shared = chip.shared_per_sm // (shared + KIB)
    per_sm = min(by_registers, by_shared, WARPS_PER_SM // warps)
    return Usage(launch.kernel.__name__, registers, shared, stack, per_sm)


def check(case: Case, folder: Path) -> list[Usage]:
    plan, launches = launches_of(case)
    usages = [usage_of(launch, case.capability, folder) for launch in launches]
    for usage in usages:
        assert usage.stack == 0, f"{case}: {usage}"
        assert usage.shared <= CHIPS[case.capability].shared_per_block, f"{case}: {usage}"
        if usage.kernel == "attend_tiles":
            planned = plan.blocks.per_sm
            assert usage.per_sm >= planned, f"{case}: {usage}, {planned} planned"
    return usages


@pytest.mark.parametrize("case", FEW, ids=str)
def test_fits_the_chip(case, tmp_path):
    check(case, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", ALL, ids=str)
def test_every_configuration_fits_the_chip(case, tmp_path):
    check(case, tmp_path)


@pytest.mark.parametrize(
    ("capability", "dim", "group", "candidates"),
    [(80, 64, 3, 8192), (90, 128, 4, 8192), (90, 256, 8, 2**30), (100, 80, 16, 8192)],
)
def test_the_choice_by_codes_fits_the_chip(capability, dim, group, candidates, tmp_path):
    n, coordinates = 131072, coordinates_for(dim)
    query_map = QueryMap(
        meta(1, 8, dim, coordinates, dtype=torch.int16),
        meta(1, 8, coordinates, dtype=torch.float32),
    )
    codes = Codes.empty(1, 8, dim, n, torch.device("meta"))
    launches = codes_backend.launches(
        meta(1, 8, group, dim, dtype=torch.float32), codes, most=n, query_map=query_map,
        counts=(meta(8), meta(1), meta(8 * group)), max_tokens=4096, n_candidates=candidates,
        min_weight=None,
        outside=meta(1, 8 * group, dtype=torch.float32), first_row=16,
        out=(meta(1, 8, 4096), meta(1, 8, 4096)), scored=meta(1, 8, dtype=torch.int64),
        left_out=meta(1, 8 * group, dtype=torch.float32),
    )  # fmt: skip
    coding = encoding(
        meta(8, 64, coordinates, dtype=torch.float32), meta(8, coordinates, dtype=torch.float32),
        codes, 0, 4096,
    )  # fmt: skip
    for launch in (coding, *launches):
        usage = usage_of(launch, capability, tmp_path)
        assert usage.stack == 0, usage
        assert usage.per_sm * launch.options["num_warps"] >= 8, usage


@pytest.mark.parametrize(
    ("capability", "dim", "group", "rows"),
    [(80, 64, 3, 16), (90, 128, 4, 16), (90, 256, 8, 32), (100, 80, 16, 128)],
)
def test_the_choice_of_a_paged_cache_fits_the_chip(capability, dim, group, rows, tmp_path):
    codes = PageCodes.empty(512, 8, rows, dim, device="meta")
    encoding = pages_backend.encoding(
        meta(7, 8, dim, dtype=torch.float32), meta(7, dtype=torch.int64), codes
    )
    choice = pages_backend.launches(
        meta(4, 8 * group, dim, dtype=torch.float32), codes, meta(4, 256), meta(4), meta(4),
        sinks=16, window=64, page_stride=rows, most=256 * rows,
        out=(meta(4, 8, 2048), meta(4, 8, 2048)),
    )  # fmt: skip
    for launch in (encoding, *choice):
        usage = usage_of(launch, capability, tmp_path)
        assert usage.stack == 0, usage
        assert usage.per_sm * launch.options["num_warps"] >= 8, usage


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("knows", [False, True])
def test_the_estimate_of_the_rest(knows, capability, dim, dtype, tmp_path):
    q = meta(4, 32, dim, dtype=dtype)
    bfloats, floats = {"dtype": torch.bfloat16}, {"dtype": torch.float32}
    moments = Moments(
        meta(4, 8, dim, 2 * dim, **bfloats), meta(4, 8, 2 * dim, **floats),
        meta(4, 8, dim, 32, **bfloats), meta(4, 8, 32, dim, **bfloats),
        meta(4, 8, 2, 32, **floats), meta(4),
    )  # fmt: skip
    scored = Scored(
        meta(4, 32, **floats), meta(4, 8, dim, **floats), meta(4, 8, dtype=torch.int64), 1024, 8
    )
    launch = rest_backend.launch(
        meta(4, 32, dim, dtype=dtype), meta(4, 32, dtype=torch.float32), q, moments,
        meta(4, 8, 1024), scored if knows else None, dim**-0.5, 1024, 0.0,
    )  # fmt: skip
    usage = usage_of(launch, capability, tmp_path)
    assert usage.stack == 0, usage
    assert usage.per_sm * launch.options["num_warps"] >= 8, usage


@pytest.mark.parametrize("n_ranges", [1, 8])
def test_a_spill_is_seen(n_ranges, tmp_path):
    case = FEW[0]._replace(n_ranges=n_ranges)
    launch = next(x for x in launches_of(case)[1] if x.kernel.__name__ == "attend_tiles")
    starved = launch._replace(options={**launch.options, "maxnreg": 64})
    assert usage_of(starved, case.capability, tmp_path).stack > 0


def test_packing_ranges_keeps_the_pipeline_full(tmp_path):
    """Several ranges get as many buffers in shared memory as one contiguous range."""
    shared = []
    for n_ranges in (1, 8):
        case = Case(90, torch.bfloat16, torch.bfloat16, 128, n_ranges, "stream", None)
        usages = {usage.kernel: usage for usage in check(case, tmp_path)}
        shared.append(usages["attend_tiles"].shared)
    two_buffers = 2 * 2 * 64 * 128 * 2
    assert shared[0] == shared[1] >= two_buffers


def main() -> int:
    """Prints the table of all configurations; 1 if one of them does not fit."""
    wanted = sys.argv[1:]
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        for case in ALL:
            if wanted and not any(word in str(case) for word in wanted):
                continue
            try:
                usages = check(case, Path(folder))
            except AssertionError as failure:
                failures += 1
                print(f"FAILS {failure}", flush=True)
                continue
            for kernel, registers, shared, stack, per_sm in usages:
                print(
                    f"{case} {kernel}: {registers} registers, {shared} B shared, {stack} B stack, "
                    f"{per_sm} an SM",
                    flush=True,
                )
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
