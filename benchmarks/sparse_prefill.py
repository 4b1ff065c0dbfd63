"""Reading a prompt within a budget: time against reading it densely, and what is lost by it.

    python -m benchmarks.sparse_prefill quality [--model smollm2]    # 8,192 tokens, hidden keys
    python -m benchmarks.sparse_prefill time [--tokens 32768,65536]  # the reference model

One thread, CPU seconds, dense and sparse one after the other in one process. `quality`: a document
with six hidden keys is read; how well its own second half is predicted while it is read, how the
keys are answered afterwards, densely and by `saap` at 10 %, and what of the middle's attention
mass `saap` then finds. The reference model was trained to 8,192 tokens: of longer texts only the
time is taken. Figures go to `$OUT`, else to `benchmarks/results/<device>/sparse_prefill.json`, one
part beside the other, and then into `docs/scale.md`.
"""

import argparse
import json
import time

import numpy as np
import torch

from saap import hf
from saap.budget import Budget
from saap.eval import reference
from saap.eval.cli.demo_words import document_with_keys
from saap.eval.decoding import decoder
from saap.eval.source_text import read_sources
from saap.eval.tasks import passkey
from saap.eval.tasks.answering import encode
from saap.eval.tasks.attention import LayerProblem, layout_of
from saap.kv import KVStore
from saap.methods import find_method
from saap.prefill import PrefillBudget

from .cpu import cpu_name, environment
from .reports import ROOT, put_table, report_path, write

COMMAND = "python -m benchmarks.sparse_prefill"
CONTEXT, CHUNK, SHARE, N_QUERIES, N_KEYS = 8192, 2048, 0.1, 16, 6
WAYS = {
    "dense": None,
    "10 %": PrefillBudget(visited=0.1),
    "10 %, `averaged=8`": PrefillBudget(visited=0.1, averaged=8),
    "20 %, `averaged=8`": PrefillBudget(visited=0.2, averaged=8),
}


class Watch:
    """CPU seconds of attention, and losses of the tokens read, while it is open."""

    def __init__(self, model, tokens, scored: bool):
        self.model, self.tokens, self.scored = model, tokens, scored
        self.attention = self.judging = 0.0
        self.losses, self.at = [], 0

    def __enter__(self):
        attend = self._attend = KVStore.attend

        def timed(store, *arguments, **options):
            began = time.process_time()
            found = attend(store, *arguments, **options)
            self.attention += time.process_time() - began
            return found

        KVStore.attend = timed
        self._hook = self.model.get_decoder().register_forward_hook(self._judge)
        return self

    def __exit__(self, *_):
        KVStore.attend = self._attend
        self._hook.remove()

    def _judge(self, _, __, output):
        if not self.scored:
            return
        began = time.process_time()
        hidden = output.last_hidden_state[0]
        targets = self.tokens[self.at + 1 : self.at + 1 + len(hidden)]
        self.at += len(hidden)
        if self.at > len(self.tokens) // 2:
            logits = self.model.get_output_embeddings()(hidden[: len(targets)]).float()
            self.losses.append(
                torch.nn.functional.cross_entropy(logits, targets, reduction="none")
            )
        self.judging += time.process_time() - began


def read(model, tokens, prefill, *, n_queries: int, scored: bool):
    with Watch(model, tokens, scored) as watch:
        began = time.process_time()
        context = hf.read_context(model, tokens, n_queries=n_queries, chunk=CHUNK, prefill=prefill)
        seconds = time.process_time() - began - watch.judging
    record = {"seconds": seconds, "attention": watch.attention, "share": context.cache.read_share}
    if scored:
        record["nats"] = float(torch.cat(watch.losses).mean())
    return context, record


@torch.no_grad()
def ask(model, tokenizer, context, pairs, wording, method: str) -> list[bool]:
    budget = Budget.for_selectivity(SHARE, context.length, n_sink=16, window=256)
    found = []
    with decoder(model, context, find_method(method)(), budget, 64) as own:
        for name, key in pairs:
            own.restart(budget)
            question = encode(tokenizer, wording.question(name).encode(), special=False)
            answer = encode(tokenizer, key.encode(), special=False)
            logits = own.logits(torch.cat([question, answer]))[len(question) - 1 : -1]
            found.append(bool((logits.argmax(-1) == answer).all()))
    return found


def recall(model, context) -> float:
    """What of the middle's mass `saap` finds at 10 %, over layers and heads."""
    budget = Budget.for_selectivity(SHARE, context.length - N_QUERIES, n_sink=16, window=256)
    caught = middle = 0.0
    for layer in hf.model_layers(model):
        if layer.is_full:
            problem = LayerProblem(context, layer.info, layout_of(budget))
            measured = problem.measure(problem.store_for(find_method("saap")(), budget), budget)
            caught += sum(measured["middle_caught"])
            middle += sum(measured["middle_mass"])
    return caught / middle


def documents(name: str, tokenizer, count: int):
    """Tokens, the keys hidden in them, and the words that ask for one."""
    for seed in range(count):
        if name != "reference":
            tokens, pairs = document_with_keys(tokenizer, CONTEXT - 64, seed)
            yield tokens, pairs, passkey.IN_WORDS
            continue
        rng = np.random.default_rng(seed)
        names = [passkey.NAMES[i] for i in rng.permutation(len(passkey.NAMES))[:N_KEYS]]
        pairs = [(own, passkey.random_key(rng)) for own in names]
        lines = [
            (float(rng.uniform(0, 0.95)), passkey.statement(*pair).encode()) for pair in pairs
        ]
        text = reference.split_held_out()[1]
        room = CONTEXT - 64 - sum(len(line) for _, line in lines)
        start = int(rng.integers(0, len(text) - room))
        text = passkey.insert_lines(text[start : start + room], lines) + b"\n"
        yield encode(tokenizer, text), pairs, passkey.IN_CODE


def quality(name: str, count: int, ways: list[str], keep) -> None:
    folder = reference.FOLDER if name == "reference" else name
    model, tokenizer = hf.load_model(folder), hf.load_tokenizer(folder)
    for number, (tokens, pairs, wording) in enumerate(documents(name, tokenizer, count)):
        for label, prefill in ((way, WAYS[way]) for way in ways):
            context, record = read(model, tokens, prefill, n_queries=N_QUERIES, scored=True)
            record["recall"] = recall(model, context)
            for method in ("dense", "saap"):
                record[method] = ask(model, tokenizer, context, pairs, wording, method)
            keep({"part": "quality", "model": name, "number": number, "way": label,
                  "tokens": len(tokens), **record})  # fmt: skip


def timing(sizes: list[int], ways: list[str], keep) -> None:
    model, tokenizer = hf.load_model(reference.FOLDER), hf.load_tokenizer(reference.FOLDER)
    text = b""
    for source in read_sources(held_out=False):
        text += source
        if len(text) > max(sizes):
            break
    tokens = encode(tokenizer, text)
    read(model, tokens[: 2 * CHUNK], WAYS["10 %"], n_queries=0, scored=False)
    for size in sizes:
        for label, prefill in ((way, WAYS[way]) for way in ways):
            _, record = read(model, tokens[:size], prefill, n_queries=0, scored=False)
            keep({"part": "time", "model": "reference", "number": 0, "way": label,
                  "tokens": size, **record})  # fmt: skip


def groups(records: list[dict], part: str):
    """Model, tokens and, way by way, the records of all documents."""
    for model, tokens in dict.fromkeys((r["model"], r["tokens"]) for r in records):
        own = [
            r for r in records
            if (r["part"], r["model"], r["tokens"]) == (part, model, tokens)
        ]  # fmt: skip
        ways = {way: [r for r in own if r["way"] == way] for way in WAYS}
        if ways["dense"]:
            yield model, tokens, {way: found for way, found in ways.items() if found}


def table(records: list[dict]) -> str:
    lines = [
        "| model, tokens | budget | rows visited | attention | reading | against dense |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for part in ("time", "quality"):
        for model, tokens, ways in groups(records, part):
            sums = {
                way: [sum(r[key] for r in own) for key in ("attention", "seconds")]
                for way, own in ways.items()
            }
            for way, (attention, seconds) in sums.items():
                share = sum(r["share"] for r in ways[way]) / len(ways[way])
                n, whole = len(ways[way]), sums["dense"]
                n_dense = len(ways["dense"])
                gain = (
                    "" if way == "dense" else
                    f"attention {whole[0] / n_dense * n / attention:.1f}x, all "
                    f"{whole[1] / n_dense * n / seconds:.1f}x"
                )  # fmt: skip
                lines.append(
                    f"| {model}, {tokens:,} | {way} | {share:.1%} | {attention / n:.1f} s | "
                    f"{seconds / n:.1f} s | {gain} |"
                )
    lines += [
        "",
        "| model, tokens | budget | nats, second half | keys answered | by `saap` at 10 % | "
        "recall of `saap` at 10 % |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for model, tokens, ways in groups(records, "quality"):
        for way, own in ways.items():
            numbers = {r["number"] for r in own}
            dense = [r["nats"] for r in ways["dense"] if r["number"] in numbers]
            nats = sum(r["nats"] for r in own) / len(own)
            told = f"{nats:.3f}" if way == "dense" else f"{nats - sum(dense) / len(dense):+.3f}"
            answers = (
                f"{sum(map(sum, (r[m] for r in own)))} of {sum(len(r[m]) for r in own)}"
                for m in ("dense", "saap")
            )
            found = sum(r["recall"] for r in own) / len(own)
            lines.append(
                f"| {model}, {tokens:,} | {way} | {told} | {' | '.join(answers)} | {found:.1%} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("quality", "time"))
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--documents", type=int, default=1)
    parser.add_argument("--tokens", default="65536,32768")
    parser.add_argument("--ways", default=";".join(WAYS), help="which budgets, ';' between them")
    options = parser.parse_args()
    torch.set_num_threads(1)
    path = report_path(cpu_name(), "sparse_prefill.json")

    def keep(record: dict) -> None:
        """Into the report, in the place of one of the same kind: each takes minutes."""
        print(record, flush=True)
        kind = ("part", "model", "number", "way", "tokens")
        held = json.loads(path.read_text())["records"] if path.exists() else []
        held = [r for r in held if any(r[key] != record[key] for key in kind)]
        write(path, {"environment": environment(), "records": [*held, record]})

    if options.part == "quality":
        quality(options.model, options.documents, options.ways.split(";"), keep)
    else:
        timing([int(n) for n in options.tokens.split(",")], options.ways.split(";"), keep)
    records = json.loads(path.read_text())["records"]
    put_table(ROOT / "docs" / "scale.md", COMMAND, table(records))
    print(table(records))


if __name__ == "__main__":
    main()
