"""A long document read once, saved, opened and asked: time and peak memory at each size.

    python -m benchmarks.document [--index FILE] [--tokens 131072,500000] [--threads 2]

The document is Python's own standard library, one file after the other; the model the shipped
reference model, far beyond the 8k tokens it was trained for: what is shown is that memory stays
bounded and answers are the same before and after the file, not that they are good. Without an
index `saap` learns from the document. Each step is a process of its own, so its peak is its own:
the first reads and answers from memory, the second maps the file and answers.

`peak_per_kv` is the growth of resident memory over that of the loaded model, which has read one
chunk, at its highest, for each byte of keys and values. JSON goes to `$OUT` or
`benchmarks/results/<device>/document.json`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import saap
from saap import hf
from saap.eval import reference
from saap.eval.source_text import read_sources
from saap.eval.tasks.answering import encode
from saap.hf.text import generate_text, read_document

from .cpu import cpu_name, environment
from .cpu_timing import load
from .reports import ROOT, report_path, write

CHUNK = 2048
N_ANSWER = 48
QUESTION = b"\n\ndef read_the_file(path):\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--index", type=Path, help="file that `saap train` wrote for the model")
    parser.add_argument("--tokens", default="131072,500000")
    parser.add_argument("--threads", type=int, help="torch's number of threads")
    parser.add_argument("--step", choices=("read", "open"), help="only this, for one size")
    parser.add_argument("--file", type=Path, help="the context file of that step")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.step:
        step = read if options.step == "read" else open_again
        print(json.dumps(step(options.index, options.file, int(options.tokens))))
        return 0
    path = report_path(cpu_name(), "document.json")
    records = json.loads(path.read_text())["records"] if path.exists() else []
    for n in options.tokens.split(","):
        record = in_two_processes(int(n), options)
        print(json.dumps(record), flush=True)
        # Long sizes take an hour: what was measured of the others stays.
        records = [r for r in records if r["tokens"] != int(n)] + [record]
        write(path, {"records": sorted(records, key=lambda r: r["tokens"])})
    print(f"wrote {path}")
    return 0


def in_two_processes(n: int, options) -> dict:
    command = [sys.executable, "-m", "benchmarks.document", "--tokens", str(n)]
    if options.index is not None:
        command += ["--index", str(options.index)]
    command += ["--threads", str(options.threads)] if options.threads else []
    with tempfile.TemporaryDirectory() as folder:
        command += ["--file", str(Path(folder) / "document.saap"), "--step"]
        first, second = (
            json.loads(
                subprocess.run(
                    [*command, step], check=True, stdout=subprocess.PIPE, cwd=ROOT
                ).stdout
            )
            for step in ("read", "open")
        )
    return {
        "tokens": n,
        "same_answer": first.pop("answer") == second.pop("answer"),
        "read": first,
        "open": second,
        "environment": {**environment(), "load_after": load()},
    }


def read(index: Path | None, file: Path, n: int) -> dict:
    model, tokenizer, trained, budget = loaded(index)
    text, size = [], 0
    for source in read_sources(held_out=False):
        text.append(source)
        size += len(source)
        if size > n:  # a token is a byte of this model
            break
    tokens = encode(tokenizer, b"\n".join(text))[:n]
    with saap.attached(model, trained, budget) as saap_model:
        read_document(saap_model, tokens[:CHUNK], chunk=CHUNK)
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from now
        before, begin = peak(), time.perf_counter()
        cache = read_document(saap_model, tokens, chunk=CHUNK, progress=told(begin))
        took, after = time.perf_counter() - begin, peak()
        begin = time.perf_counter()
        saap_model.save_context(cache, tokens, file)
        saving = time.perf_counter() - begin
        answer = asked(model, tokenizer, tokens, cache)
        kv = sum(2 * layer.store.k[:, :, :n].nbytes for layer in cache.saap_layers)
        return {
            "read_s": took,
            "save_s": saving,
            "kv_bytes": kv,
            "file_bytes": file.stat().st_size,
            "peak_per_kv": (after - before) / kv,
            "peak_with_save_and_answer_per_kv": (peak() - before) / kv,
            "tokens_per_s_of_answer": answer.tokens_per_second,
            "visited_share": cache.visited_share,
            "answer": answer.text,
        }


def open_again(index: Path | None, file: Path, n: int) -> dict:
    model, tokenizer, trained, budget = loaded(index)
    with saap.attached(model, trained, budget) as saap_model:
        begin = time.perf_counter()
        cache, tokens = saap_model.open_context(file)
        opening = time.perf_counter() - begin
        answer = asked(model, tokenizer, tokens, cache)
        return {
            "open_s": opening,
            "tokens_per_s_of_answer": answer.tokens_per_second,
            "answer": answer.text,
        }


def asked(model, tokenizer, tokens, cache):
    question = torch.cat([tokens, encode(tokenizer, QUESTION, special=False)])
    return generate_text(model, tokenizer, question, N_ANSWER, cache=cache)


def loaded(index: Path | None):
    trained = None if index is None else saap.TrainedIndex.load(index)
    told = {name: trained.metadata[name] for name in ("n_sink", "window")} if trained else {}
    budget = saap.Budget(max_tokens=saap.Budget.default().max_tokens, **told)
    folder = reference.FOLDER
    return hf.load_model(folder), hf.load_tokenizer(folder), trained, budget


def told(begin: float):
    def tell(done: int, total: int) -> None:
        spent = time.perf_counter() - begin
        # The work of a chunk grows with what is before it, so time goes with the square.
        left = spent * ((total / done) ** 2 - 1)
        print(f"\r{done:,} of {total:,} tokens, {left:,.0f} s left ", end="", file=sys.stderr)

    return tell


def peak() -> int:
    """The highest resident memory since the last reset; `ru_maxrss` starts at the parent's."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


if __name__ == "__main__":
    sys.exit(main())
