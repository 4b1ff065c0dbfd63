"""Saap inside vLLM, beside vLLM itself: speed, what is visited, and answers, in one engine.

    make vllm                                          # the environment, the tests, then this
    python -m benchmarks.vllm [--parts speed,long,recall,passkeys] [--prompts 16]

Stock and sparse decode steps take turns in the same engine on the same requests. Parts:

    speed      SmolLM2 at 2k, 4k and 7.9k tokens, 1 and 8 requests
    long       random weights, attention of the shape of Llama 3.1 8B's, 32k to 128k tokens; the
               prompt's own attention is left out, as nothing depends on it
    recall     attention mass that the visited pages hold, of all tokens and of the middle
    passkeys   pass keys at 8k; question and context are read densely, as vLLM does it

Results go to `$OUT`, else to `benchmarks/results/<device>/vllm.json` and into `docs/vllm.md`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from .reports import ROOT, put_table, report_path, write

PARTS = ("speed", "long", "recall", "passkeys")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--model", help="a folder with SmolLM2, else made from its package")
    parser.add_argument("--visited", type=float, default=0.1, help="share of the pages")
    parser.add_argument("--prompts", type=int, default=16, help="pass keys")
    parser.add_argument("--steps", type=int, default=12, help="decode steps of a turn")
    parser.add_argument("--contexts", type=int, nargs="*", help="instead of a part's own")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--in-engine", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.in_engine:
        from .vllm_parts import run_part

        print("\nRESULT " + json.dumps(run_part(options.in_engine, options)))
        return
    wanted = options.parts.split(",")
    unknown = [part for part in wanted if part not in PARTS]
    if unknown:
        parser.error(f"parts must be some of {', '.join(PARTS)}; got {', '.join(unknown)}")
    from .cpu import cpu_name, environment

    path = report_path(cpu_name(), "vllm.json")
    report = json.loads(path.read_text()) if path.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or made_from_package(Path(folder))
        for part in wanted:
            before = environment()
            records = in_own_process(part, model, options)
            print_part(part, records)
            report[part] = {
                "environment": before, "visited": options.visited, "records": records,
            }  # fmt: skip
            keep(path, report)


def keep(path: Path, report: dict) -> None:
    """Parts of earlier runs stay as they are."""
    write(path, report)
    for part, own in report.items():
        put_table(
            ROOT / "docs" / "vllm.md", f"python -m benchmarks.vllm {part}", table(own["records"])
        )


def table(records: list[dict]) -> str:
    """A column for each name of a record; shares in per cent."""
    names = list(records[0])
    lines = [
        "| " + " | ".join(name.replace("_", " ") for name in names) + " |",
        "|" + "---|" * len(names),
    ]
    for record in records:
        cells = [shown(name, record[name]) for name in names]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def shown(name: str, value: float) -> str:
    if name in ("visited", "budget") or "recall" in name:
        return f"{value:.1%}"
    return f"{value:,}" if isinstance(value, int) else f"{value:.{2 if name == 'ratio' else 1}f}"


def made_from_package(folder: Path) -> str:
    """SmolLM2 as a folder that vLLM reads, in float32."""
    from saap import hf

    hf.load_model("smollm2").save_pretrained(folder)
    hf.load_tokenizer("smollm2").save_pretrained(folder)
    return str(folder)


def in_own_process(part: str, model: str, options) -> list[dict]:
    """Each part has a process of its own: an engine's cache is gone with it."""
    space = "5" if part == "long" else "4"
    settings = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": space,
        "VLLM_LOGGING_LEVEL": "ERROR",
        "SAAP_VLLM": f"visited={options.visited},dense_below=0",
    }
    command = [sys.executable, "-m", "benchmarks.vllm", "--in-engine", part, "--model", model]
    for name in ("visited", "prompts", "steps"):
        command += [f"--{name}", str(getattr(options, name))]
    command += ["--batches", *map(str, options.batches)]
    if options.contexts:
        command += ["--contexts", *map(str, options.contexts)]
    done = subprocess.run(
        command, env=os.environ | settings, stdout=subprocess.PIPE, text=True, check=False
    )
    lines = [x for x in done.stdout.splitlines() if x.startswith("RESULT ")]
    if done.returncode or not lines:
        sys.exit(f"part {part} must end with a result; got exit status {done.returncode}")
    return json.loads(lines[-1].removeprefix("RESULT "))


def print_part(part: str, records: list[dict]) -> None:
    for record in records:
        print(part, *(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}"
                      for k, v in record.items()), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
