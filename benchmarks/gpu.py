"""`make gpu`: the GPU-marked tests, then decode attention of Llama-3-8B's heads against its peers.

One H100 or H200, under 10 minutes. Raw records and their summary go to `$OUT`, else to
`benchmarks/results/<device>/`, rewritten after every section, and the last line printed is the
summary as JSON. Times are medians of CUDA-graph replays over stores larger than the caches; bytes
are the selected rows of k and v, and the limit is the bandwidth of a copy measured in the same
run. No time is reported behind a red test, unless asked with `--keep-going`.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from .reports import ROOT, report_path, write

LIMIT_S = 300
TESTS_LIMIT_S = 300
GPU_TESTS = [
    "tests/kernels", "tests/test_gpu.py", "tests/test_ivf_gpu.py", "tests/vllm/test_rows.py",
]  # fmt: skip
STEPS = [(1, "171k", 0.044), (1, "32k", 0.05), (1, "128k", 0.05), (8, "128k", 0.05),
         (1, "512k", 0.0125)]  # fmt: skip
PAGED = [(1, "32k"), (1, "128k"), (8, "32k"), (8, "128k")]
CHOICES = [(1, "32k"), (1, "128k"), (8, "128k"), (1, "512k")]


def main() -> int:
    options = parse()
    if options.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"
    import torch

    if not (options.rehearse or torch.cuda.is_available()):
        print("benchmarks.gpu needs a CUDA device: torch.cuda.is_available() is False")
        return 2
    begin = time.monotonic()
    device = torch.device("cpu" if options.rehearse else "cuda")
    report: dict[str, Any] = {"environment": environment(device), "tests": "skipped"}
    path = result_path(device)
    if not (options.skip_tests or options.rehearse):
        report["tests"] = run_tests()
        write(path, report)
        if report["tests"] != "passed" and not options.keep_going:
            print(json.dumps({"tests": report["tests"]}))
            return 1
    failures = run_sections(device, options, time.monotonic(), report, path)
    report["seconds"] = round(time.monotonic() - begin, 1)
    write(path, report)
    print(f"wrote {path}")
    print(
        json.dumps({"tests": report["tests"], **report["summary"], "seconds": report["seconds"]})
    )
    return int(failures > 0 or report["tests"] not in ("passed", "skipped"))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--skip-tests", action="store_true", help="only the timings")
    parser.add_argument("--keep-going", action="store_true", help="time behind red tests, too")
    parser.add_argument("--tune", action="store_true", help="only compare block sizes")
    parser.add_argument("--seconds", type=float, default=LIMIT_S, help="for the timings")
    parser.add_argument("--sections", help="only those, by the beginnings of their names: a,b")
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="tiny shapes on the CPU in Triton's interpreter, to try this script without a GPU",
    )
    return parser.parse_args()


def environment(device) -> dict[str, Any]:
    import torch
    import triton

    described = {
        "device": platform.machine() if device.type == "cpu" else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "command": sys.argv[1:],
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        described |= {
            "capability": f"sm_{properties.major}{properties.minor}",
            "sms": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
        }
    return described


def commit() -> str:
    """Of this checkout; `$COMMIT` where a copy without its history runs."""
    if "COMMIT" in os.environ:
        return os.environ["COMMIT"]
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def result_path(device) -> Path:
    import torch

    name = "rehearsal" if device.type == "cpu" else torch.cuda.get_device_name()
    return report_path(name, "gpu.json")


def run_tests() -> str:
    """`"passed"`, or the last line of what pytest said."""
    # Most of the time goes into compiling, each process for itself.
    jobs = str(min(8, os.cpu_count() or 1))
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    command += ["-n", jobs, "--tb=short", *GPU_TESTS]
    try:
        done = subprocess.run(
            command, cwd=ROOT, timeout=TESTS_LIMIT_S, capture_output=True, text=True
        )
    except subprocess.TimeoutExpired:
        return f"not done after {TESTS_LIMIT_S} s"
    lines = done.stdout.strip().splitlines() or [done.stderr.strip()[-500:]]
    if done.returncode == 0:
        print(f"GPU tests: {lines[-1]}", flush=True)
        return "passed"
    print(done.stdout[-6000:], done.stderr[-2000:], flush=True)
    return lines[-1]


def run_sections(device, options, begin: float, report: dict[str, Any], path: Path) -> int:
    """Runs section after section within its seconds; returns how many broke."""
    import torch

    from . import gpu_sections as sections
    from .gpu_summary import summarise
    from .gpu_timing import Pool, copy_gbps

    torch.manual_seed(0)
    shrink = 512 if options.rehearse else 1
    dtype = torch.float16 if options.rehearse else torch.bfloat16
    copy = copy_gbps(device)
    print(f"copy {copy:.0f} GB/s", flush=True)
    elements = 2**22
    if device.type == "cuda":
        free = torch.cuda.mem_get_info()[0]
        elements = min(int(0.35 * free) // 2, 32 * 8 * 2**19 * 128)
    deadline = {"at": begin + options.seconds}
    bench = sections.Bench(
        device=device,
        dtype=dtype,
        pool=Pool(elements, device, dtype),
        copy_gbps=copy,
        shrink=shrink,
        left_s=lambda: deadline["at"] - time.monotonic(),
    )
    failures = 0
    wanted = None if options.sections is None else tuple(options.sections.split(","))
    for name, seconds, run in plan_sections(options.tune):
        if wanted is not None and not name.startswith(wanted):
            continue
        now = time.monotonic()
        deadline["at"] = min(now + seconds, begin + options.seconds)
        if bench.left_s() < 3:
            bench.records.append({"section": name, "failed": "no time left"})
            continue
        try:
            run(bench)
        except Exception as failure:
            failures += 1
            reason = f"{type(failure).__name__}: {str(failure)[:500]}"
            bench.records.append({"section": name, "broke": reason})
            print(f"{name} broke: {reason}", flush=True)
        print(f"{name}: {time.monotonic() - now:.1f} s", flush=True)
        report |= {
            "copy_gbps": copy,
            "summary": summarise(bench.records, copy),
            "records": bench.records,
        }
        write(path, report)
    return failures


def plan_sections(tune: bool) -> list[tuple[str, float, Any]]:
    """Name, seconds and function of each section, the most telling first.

    The largest stores come last: a peer that breaks the CUDA context on them takes nothing along.
    """
    from . import gpu_peers as peers
    from . import gpu_sections as s
    from .gpu_pages import paged
    from .gpu_steps import step
    from .gpu_tune import tune as tune_blocks

    if tune:
        return [("tune", 420, tune_blocks)]
    headline = [(1, "128k"), (1, "171k")]
    grid = [(b, c) for b in (1, 8, 32) for c in ("8k", "32k", "128k", "512k")]
    grid.remove((1, "128k"))
    uniform = peers.SDPA | peers.INSTALLED
    every = peers.SDPA | peers.EACH | peers.INSTALLED

    def selections(bench: s.Bench) -> None:
        for share in (0.044, 0.05):
            s.selection(bench, 1, "171k", share, edges=True)
        for batch, share in ((b, p) for b in (1, 8, 32) for p in (0.01, 0.02, 0.05, 0.1)):
            s.selection(bench, batch, "128k", share)
        s.single_tokens(bench, "171k", 0.05)

    def choices(bench: s.Bench) -> None:
        for batch, context in CHOICES if bench.shrink == 1 else CHOICES[:1]:
            s.choice(bench, batch, context)

    def steps(bench: s.Bench) -> None:
        for batch, context, share in STEPS:
            step(bench, batch, context, share, "saap")
        step(bench, 1, "171k", None, "dense")

    def pages(bench: s.Bench) -> None:
        for batch, context in PAGED if bench.shrink == 1 else PAGED[:1]:
            paged(bench, batch, context)

    return [
        ("dense headline", 40, lambda bench: s.dense(bench, headline, uniform)),
        ("selections", 60, selections),
        ("choice by codes", 30, choices),
        ("steps", 60, steps),
        ("paged", 30, pages),
        ("ragged", 60, lambda bench: s.ragged(bench, [8, 32], every)),
        ("eight bits", 20, lambda bench: s.eight_bits(bench, "128k")),
        ("host", 10, lambda bench: s.host_time(bench, "128k")),
        ("flex dense", 60, lambda bench: s.dense(bench, headline, peers.COMPILED)),
        ("flex ragged", 60, lambda bench: s.ragged(bench, [8], peers.COMPILED)),
        ("dense grid", 90, lambda bench: s.dense(bench, grid, uniform)),
    ]


if __name__ == "__main__":
    sys.exit(main())
