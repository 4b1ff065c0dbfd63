"""`make bench`: decode attention on the CPU against torch, at Llama-3-8B's heads (32/8/128).

Dense attention and selections of 1 to 10 % of the rows in buckets of log-normal size, over 8k,
32k and 128k rows, against torch's SDPA with the query heads of a group *packed* as the query
length of one KV head, and with `enable_gqa`, the weaker baseline; a ragged batch against a
uniform one. The limit is a plain read of the same bytes. Everything that is compared takes turns
within one run, and ratios are medians over the turns. Raw records go to `$OUT`, else to
`benchmarks/results/<device>/`; the last line printed is their summary as JSON.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numba
import torch

from .cpu_sections import Bench, dense_and_selected, ragged
from .cpu_summary import summarise, table
from .cpu_timing import load
from .gpu import commit
from .reports import ROOT, report_path, write

ROWS = (8192, 32768, 131072)


def main() -> int:
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    begin = time.monotonic()
    report: dict[str, Any] = {"environment": environment(), "first_call_s": first_call_s()}
    bench = Bench(seconds=options.seconds, shrink=options.shrink)
    for rows in ROWS:
        dense_and_selected(bench, rows, torch.float32)
    ragged(bench, torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        dense_and_selected(bench, ROWS[-1], dtype)
    report["environment"]["load_after"] = load()
    report["seconds"] = round(time.monotonic() - begin, 1)
    report |= {"summary": summarise(bench.records), "records": bench.records}
    path = result_path(options.shrink)
    write(path, report)
    print_report(report)
    print(f"\nwrote {path}")
    print(json.dumps({"first_call_s": report["first_call_s"], **report["summary"]}))
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=15, help="of turns for each table")
    parser.add_argument(
        "--threads", type=int, help="torch's number of threads; its own if not given"
    )
    parser.add_argument("--shrink", type=int, default=1, help="divide all row counts, to try it")
    return parser.parse_args()


def environment() -> dict[str, Any]:
    settings = ("OMP_NUM_THREADS", "OMP_PROC_BIND", "OMP_WAIT_POLICY")
    return {
        "device": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "numba": numba.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
        "commit": commit(),
        "command": [Path(a).name if "/" in a else a for a in sys.argv[1:]],
        "settings": {name: os.environ[name] for name in settings if name in os.environ},
        "load_before": load(),
    }


def cpu_name() -> str:
    """Model name as the system tells it, else the architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def first_call_s() -> dict[str, float]:
    """Seconds to make the kernel for float32 ready in a new process: compiled, then cached.

    `_cpu` is time on a core, without what other processes took meanwhile.
    """
    code = (
        "import time, torch\n"
        "from saap.kernels.attention import numba\n"
        "begin = time.process_time()\n"
        "print(numba.warmup(torch.float32), time.process_time() - begin)"
    )
    with tempfile.TemporaryDirectory() as folder:
        spent = []
        for _ in range(2):
            done = subprocess.run(
                [sys.executable, "-c", code],
                cwd=ROOT,
                env={**os.environ, "NUMBA_CACHE_DIR": folder},
                capture_output=True,
                text=True,
                check=True,
            )
            spent += [round(float(seconds), 2) for seconds in done.stdout.split()]
    return dict(
        zip(("compiled", "compiled_cpu", "from_disk", "from_disk_cpu"), spent, strict=True)
    )


def result_path(shrink: int) -> Path:
    return report_path(cpu_name() if shrink == 1 else "rehearsal", "cpu.json")


def print_report(report: dict[str, Any]) -> None:
    e = report["environment"]
    print(
        f"{e['device']}, {e['threads']} threads of {e['cores']} cores, {e['capability']}; "
        f"torch {e['torch']}, numba {e['numba']}; "
        f"load {e['load_before']} before, {e['load_after']} after"
    )
    first = report["first_call_s"]
    print(
        f"kernel ready after {first['compiled']} s when compiled ({first['compiled_cpu']} s on a "
        f"core), {first['from_disk']} s from the disk cache"
    )
    print(table(report["records"]))


if __name__ == "__main__":
    sys.exit(main())
