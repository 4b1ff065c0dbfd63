"""A million decoded tokens over one cache: does memory stay level, does anything drift?

    python -m benchmarks.endurance [--tokens 1000000] [--method saap] [--seed 0] [--threads 1]

The shipped reference model decodes a left-padded batch at a sparse budget. At random the cache is
flushed, cut back by some tokens or by thousands or emptied, its sequences change places, and whole
turns of text are read, so that contexts stay between 1k and 6k tokens. Beside it every key and
value is kept once more in the order in which it came. Each thousand tokens the next step is
computed

- over the cache with a budget that holds every row, so by way of selection and all ranges;
- by transformers over what was kept, in float32 and in float64.

The first may err against the third at most twice as much as the second, and some rounding. If it
errs more, the run ends there and tells the seed. How often the sparse step's likeliest token is
that of the dense one is noted, too, and the resident memory. A line every minute tells what is
left to do. JSON goes to `$OUT` or `benchmarks/results/<device>/endurance.json`; it is written over
from time to time, so a run that was ended has left what it found.
"""

import argparse
import dataclasses
import os
import random
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from transformers import DynamicCache

import saap
from saap import hf
from saap.budget import Budget
from saap.eval import reference
from saap.eval.decoding import divergence

from .cpu import cpu_name, environment
from .cpu_timing import load
from .reports import report_path, write

BATCH, LEAST, MOST = 8, 1024, 6144  # sequences, and tokens of their contexts
LONGEST_TURN = 256
BUDGET = Budget(max_tokens=192, n_sink=4, window=64)
WHOLE = dataclasses.replace(BUDGET, max_tokens=MOST)
CHECK_EVERY, NOTE_EVERY, WRITE_EVERY = 1000, 5000, 20000  # decoded tokens
ROUNDING = 16  # units in the last place of the largest logit, for three layers in another order


class Conversation:
    """A cache under trial, and its keys and values in the order in which they came."""

    def __init__(self, model, exact_model, saap_model, seed: int):
        self.model, self.exact_model = model, exact_model
        self.own = random.Random(seed)
        torch.manual_seed(seed)
        self.text = torch.frombuffer(bytearray(reference.held_out_text()), dtype=torch.uint8)
        self.cache = saap_model.cache(MOST + LONGEST_TURN)
        self.cache.observer = self.keep
        config = model.config
        shape = (2, BATCH, config.num_key_value_heads, MOST + LONGEST_TURN + 1, config.head_dim)
        self.kept = [torch.zeros(shape) for _ in range(config.num_hidden_layers)]
        names = "decoded", "turns", "read", "cuts", "cut_tokens", "flushes", "exchanges", "resets"
        self.counts = dict.fromkeys(names, 0)
        self.start()

    def start(self) -> None:
        """Read other texts into the empty cache, with other padding."""
        padding = torch.tensor([self.own.randrange(64) for _ in range(BATCH)])
        self.slots, self.mask = 0, (torch.arange(LEAST) >= padding[:, None]).long()
        self.next = self.drawn(self.forward(self.pieces(LEAST)))

    def keep(self, call) -> None:
        new = slice(self.slots, self.slots + call.k_rope.shape[2])
        self.kept[call.layer][0, :, :, new] = call.k_rope
        self.kept[call.layer][1, :, :, new] = call.v

    def pieces(self, length: int) -> Tensor:
        """`[BATCH, length]`: text from other places for each sequence."""
        starts = (self.own.randrange(len(self.text) - length) for _ in range(BATCH))
        return torch.stack([self.text[s : s + length].long() for s in starts])

    def inputs(self, ids: Tensor) -> dict[str, Tensor]:
        """What a model is to be given beside its cache, for `ids [BATCH, T]` after all others."""
        missing = self.slots + ids.shape[1] - self.mask.shape[1]
        mask = torch.cat([self.mask, self.mask.new_ones(BATCH, max(0, missing))], 1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        if not self.slots:  # padding is in front of the first text alone
            positions = torch.where(mask > 0, positions, 0)
        return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}

    def logits(self, model, cache, ids: Tensor) -> Tensor:
        found = model(**self.inputs(ids), **hf.over(cache), logits_to_keep=1)
        return found.logits[:, -1]

    def forward(self, ids: Tensor) -> Tensor:
        """`logits [BATCH, vocab]` after tokens that stay in the cache."""
        found = self.logits(self.model, self.cache, ids)
        self.mask = self.inputs(ids)["attention_mask"]
        self.slots += ids.shape[1]
        return found

    def drawn(self, logits: Tensor) -> Tensor:
        return torch.multinomial(logits.softmax(-1), 1)

    def step(self) -> None:
        """One token for each sequence, and now and then something else."""
        chance = self.own.random()
        if self.slots >= MOST or chance > 1 - 1 / 2000:
            if self.own.random() < 0.3:
                self.cache.reset()
                self.start()
                self.counts["resets"] += 1
            else:
                self.cut(self.slots - self.own.randrange(LEAST + 64, max(self.slots, LEAST + 65)))
        elif chance < 1 / 100:
            for layer in self.cache.saap_layers:
                layer.store.settle()
            self.counts["flushes"] += 1
        elif chance < 1 / 50:
            self.cut(self.own.randrange(1, 33))
        elif chance < 1 / 45:
            chosen = torch.tensor([self.own.randrange(BATCH) for _ in range(BATCH)])
            if self.own.random() < 0.7:
                chosen = chosen.argsort()
            self.cache.reorder_cache(chosen)
            self.kept = [kept[:, chosen] for kept in self.kept]
            self.mask, self.next = self.mask[chosen], self.next[chosen]
            self.counts["exchanges"] += 1
        elif chance < 1 / 40:
            turn = self.pieces(self.own.randrange(2, LONGEST_TURN))
            self.next = self.drawn(self.forward(torch.cat([self.next, turn], 1)))
            self.counts["turns"] += 1
            self.counts["read"] += BATCH * turn.shape[1]
        if self.slots < MOST:
            self.next = self.drawn(self.forward(self.next))
            self.counts["decoded"] += BATCH

    def cut(self, n: int) -> None:
        n = min(n, self.slots - LEAST - 64)
        if n > 0:
            self.cache.crop(-n)
            self.slots -= n
            self.mask = self.mask[:, : self.slots]
            self.counts["cuts"] += 1
            self.counts["cut_tokens"] += n * BATCH

    @contextmanager
    def budget(self, budget: Budget) -> Iterator[None]:
        stores = [layer.store for layer in self.cache.saap_layers]
        before = [store.budget for store in stores]
        try:
            for store in stores:
                store.budget = budget
            yield
        finally:
            for store, own in zip(stores, before, strict=True):
                store.budget = own

    def check(self) -> dict:
        """Errors of the next step's logits, which leaves nothing behind."""
        kept = [t[:, :, :, : self.slots].clone() for t in self.kept]
        dense = self.dense(self.model, kept, torch.float32)
        exact = self.dense(self.exact_model, kept, torch.float64)
        with self.cache.on_trial():
            sparse = self.logits(self.model, self.cache, self.next)
        with self.budget(WHOLE), self.cache.on_trial():
            whole = self.logits(self.model, self.cache, self.next)
            visited = self.cache.visited_share
        rounding = ROUNDING * torch.finfo(torch.float32).eps * float(exact.abs().max())
        plain = float((dense - exact).abs().max())
        same = sparse.argmax(-1) == exact.argmax(-1)
        return {
            "decoded": self.counts["decoded"], "context": self.slots,
            "error": float((whole - exact).abs().max()), "dense_error": plain,
            "allowed": 2 * plain + rounding, "whole_visited": visited,
            "sparse_same": int(same.sum()), "sparse_nats": divergence(exact, sparse),
        }  # fmt: skip

    def dense(self, model, kept: list[Tensor], dtype: torch.dtype) -> Tensor:
        cache = DynamicCache(config=model.config)
        for number, (k, v) in enumerate(kept):
            cache.update(k.to(dtype), v.to(dtype), number)
        return self.logits(model, cache, self.next)


def resident_mib() -> float:
    """Memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return round(pages * os.sysconf("SC_PAGESIZE") / 2**20, 1)


def summary(checks: list[dict], memory: list[dict], counts: dict, seconds: float) -> dict:
    """Everything in ten parts of the run, the last beside the first."""
    tenths = [checks[i * len(checks) // 10 : (i + 1) * len(checks) // 10] for i in range(10)]
    tenths = [part for part in tenths if part]
    half = [m["resident_mib"] for m in memory[len(memory) // 10 : len(memory) // 2]]
    rest = [m["resident_mib"] for m in memory[len(memory) // 2 :]]
    return {
        **counts, "checks": len(checks), "seconds": round(seconds, 1),
        "within": sum(c["error"] <= c["allowed"] for c in checks),
        "largest_error": max(c["error"] for c in checks),
        "largest_dense_error": max(c["dense_error"] for c in checks),
        "error_by_tenth": [max(c["error"] for c in part) for part in tenths],
        "sparse_same_by_tenth": [
            round(sum(c["sparse_same"] for c in part) / (BATCH * len(part)), 4) for part in tenths
        ],
        "sparse_nats_by_tenth": [
            round(sum(c["sparse_nats"] for c in part) / len(part), 5) for part in tenths
        ],
        "contexts": [min(c["context"] for c in checks), max(c["context"] for c in checks)],
        "highest_mib_first_half": max(half, default=None),
        "highest_mib_second_half": max(rest, default=None),
    }  # fmt: skip


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1_000_000, help="decoded in all")
    parser.add_argument("--method", default="saap")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="torch's number of threads")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    model = hf.load_model(reference.FOLDER)
    exact_model = hf.load_model(reference.FOLDER, dtype=torch.float64)
    path = report_path(cpu_name(), "endurance.json")
    report = {
        "environment": environment(), "method": options.method, "seed": options.seed,
        "batch": BATCH, "budget": dataclasses.asdict(BUDGET),
    }  # fmt: skip
    checks: list[dict] = []
    memory: list[dict] = []
    begin = told = time.monotonic()
    with saap.attached(model, method=options.method, budget=BUDGET) as saap_model:
        run = Conversation(model, exact_model, saap_model, options.seed)
        due = {"check": CHECK_EVERY, "note": NOTE_EVERY, "write": WRITE_EVERY}
        while run.counts["decoded"] < options.tokens:
            run.step()
            done, now = run.counts["decoded"], time.monotonic()
            last = done >= options.tokens
            if done >= due["note"] or last:
                memory.append({"decoded": done, "resident_mib": resident_mib()})
                due["note"] += NOTE_EVERY
            if done >= due["check"] or last:
                checks.append(run.check())
                due["check"] += CHECK_EVERY
            wrong = checks and checks[-1]["error"] > checks[-1]["allowed"]
            if done >= due["write"] or last or wrong:
                report["summary"] = summary(checks, memory, run.counts, now - begin)
                write(path, report | {"memory": memory, "checks": checks[-20:]})
                due["write"] += WRITE_EVERY
            if wrong:
                print(f"seed {options.seed}: an error is too large: {checks[-1]}")
                return 1
            if now - told > 60:
                told, left = now, (now - begin) / done * (options.tokens - done) / 60
                line = f"{done:,} tokens, {left:.0f} minutes left, {resident_mib():,.0f} MiB"
                print(f"{line}, last check {checks[-1] if checks else None}", flush=True)
    report["environment"]["load_after"] = load()
    write(path, report | {"memory": memory, "checks": checks[-20:]})
    print(report["summary"])
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
