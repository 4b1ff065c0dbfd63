"""Whose candidates: what of a coarse code's choice decides whether a hidden key is found.

    python -m benchmarks.candidates [--documents 2]     # needs SmolLM2: `make models`

Reads documents with hidden keys, as `saap demo` does, and asks for each key at 5 % of the rows.
The rows whose whole code is read are chosen in several ways, by the coarse code or by parts of
it, in plain PyTorch; the last step is that of `saap`. Figures go to `$OUT`, else to
`benchmarks/results/<device>/candidates.json`, and then into `docs/routing.md`.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

from saap import hf
from saap.budget import Budget
from saap.eval.cli.demo_words import IN_WORDS, MODEL, document_with_keys
from saap.eval.decoding import decoder
from saap.eval.tasks.answering import encode
from saap.kernels.codes import layout, reference
from saap.kernels.codes.layout import GROUPS
from saap.methods import find_method
from saap.methods import saap as saap_module

from . import reuse
from .cpu import cpu_name, environment
from .reports import ROOT, put_table, report_path, write

CONTEXT, SHARE = 8192, 0.05
Choose = Callable[[Tensor], Tensor]
"""Which rows are candidates, by the coarse scores `[G, n]` of a group's heads."""


def of_group(count: int) -> Choose:
    def choose(scores):
        log_weights = scores - scores.logsumexp(-1, keepdim=True)
        return reference.best(log_weights.amax(0), min(count, scores.shape[1]))

    return choose


def of_each_head(count: int) -> Choose:
    def choose(scores):
        return scores.topk(min(count, scores.shape[1]), -1).indices.unique()

    return choose


def everything(scores: Tensor) -> Tensor:
    return torch.arange(scores.shape[1])


# Label, how many groups of coordinates the coarse code may use, choice.
WAYS = (
    ("of the group, 1,024", GROUPS, of_group(1024)),
    ("of the group, 2,048", GROUPS, of_group(2048)),
    ("of each head, 256", GROUPS, of_each_head(256)),
    ("of each head, 512", GROUPS, of_each_head(512)),
    ("of each head, 768", GROUPS, of_each_head(768)),
    ("of each head, 1,024", GROUPS, of_each_head(1024)),
    ("of each head, 1,024, by the first coordinates' 2 bits alone", 1, of_each_head(1024)),
    ("every row", GROUPS, everything),
)


class Choice:
    """Stands in for the choice of rows of `saap`'s selector, in plain PyTorch."""

    def __init__(self, groups: int, choose: Choose):
        self.groups, self.choose, self.read = groups, choose, []
        self._decoded = {}  # what was decoded last of each layer's codes

    def __call__(
        self, selector, q, beside, codes, n_rows, *, max_tokens, query_map, first_row, out,
        scored, **_,
    ):  # fmt: skip
        fine, coarse = self._decode(codes, *n_rows)
        starts, lengths = (t.zero_() for t in out)
        outside = beside(q)[0].unflatten(0, (len(fine), -1))
        for h, heads in enumerate(query_map(q)[0].unflatten(0, (len(fine), -1))):
            candidates = self.choose(self.scores(selector, h, heads, fine[h], coarse[h]))
            scores = heads @ fine[h, candidates].T
            weights = reuse.weights_of(scores[None], outside[None, h])[0]
            rows = candidates[reference.best(weights, max_tokens)]
            begins, counts = reference.as_ranges(rows)
            starts[0, h, : len(begins)], lengths[0, h, : len(begins)] = begins + first_row, counts
            scored[0, h] = len(candidates)
            self.read.append(len(candidates))
        return starts, lengths

    def scores(self, selector, head: int, q: Tensor, fine: Tensor, coarse: Tensor) -> Tensor:
        """By which candidates are chosen, `[G, n]`, of a KV head's queries `q [G, P]`."""
        return q @ coarse.T

    def _decode(self, codes, n: int) -> tuple[Tensor, Tensor]:
        held, of, decoded = self._decoded.get(id(codes), (None, 0, None))
        if held is not codes or of != n:
            fine, coarse = (f(codes)[0, :, :n] for f in (layout.decode, layout.decode_coarse))
            coarse[..., self.groups * coarse.shape[-1] // GROUPS :] = 0
            decoded = fine, coarse
            self._decoded[id(codes)] = codes, n, decoded
        return decoded


@contextmanager
def chosen_by(choice: Choice) -> Iterator[None]:
    """`saap` asks this at each step, and does not repeat its last choice."""
    ways = {"choose_rows": lambda *given, **named: choice(*given, **named)}  # given its selector
    with mock.patch.multiple(saap_module.SaapSelector, again=lambda *_: None, **ways):
        yield


def ask(model, tokenizer, read, pairs, method) -> list[tuple[bool, float]]:
    """Of each key: whether every token of it was the likeliest, and its log-probability."""
    window = read.length // 32
    budget = Budget.for_selectivity(SHARE, read.length, window=window, estimate_rest=False)
    found = []
    with decoder(model, read, method, budget, 64) as own:
        for name, key in pairs:
            own.restart(budget)
            question = encode(tokenizer, IN_WORDS.question(name).encode(), special=False)
            answer = encode(tokenizer, key.encode(), special=False)
            logits = own.logits(torch.cat([question, answer]))[len(question) - 1 : -1]
            likely = logits.log_softmax(-1).gather(-1, answer[:, None]).sum()
            found.append((bool((logits.argmax(-1) == answer).all()), float(likely)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=2, help="each with six keys")
    options = parser.parse_args()
    model, tokenizer = hf.load_model(MODEL), hf.load_tokenizer(MODEL)
    records = {label: {"read": [], "keys": []} for label, *_ in WAYS}
    records["dense attention"] = {"read": [], "keys": []}
    for seed in range(options.documents):
        tokens, pairs = document_with_keys(tokenizer, CONTEXT - 64, seed)
        read = hf.read_context(model, tokens, chunk=1024)
        records["dense attention"]["keys"] += ask(
            model, tokenizer, read, pairs, find_method("dense")()
        )
        for label, groups, choose in WAYS:
            choice = Choice(groups, choose)
            with chosen_by(choice):
                keys = ask(model, tokenizer, read, pairs, find_method("saap")())
            records[label]["keys"] += keys
            records[label]["read"] += [sum(choice.read) / len(choice.read)]
            print(f"document {seed}, {label}: {sum(right for right, _ in keys)}", flush=True)
    write(
        report_path(cpu_name(), "candidates.json"),
        {"environment": environment(), "context": CONTEXT, "share": SHARE, "records": records},
    )
    put_table(ROOT / "docs" / "routing.md", "python -m benchmarks.candidates", table(records))


def kept(dense: list, keys: list) -> tuple[int, int, float]:
    """Keys that dense attention answers: how many there are, are answered, and how likely."""
    known = [i for i, (right, _) in enumerate(dense) if right]
    return len(known), sum(keys[i][0] for i in known), sum(keys[i][1] for i in known)


def table(records: dict) -> str:
    """Log-probabilities are of the keys that dense attention answers."""
    dense = records["dense attention"]["keys"]
    known, *_ = kept(dense, dense)
    lines = [
        f"| candidates | whole codes read | of {known} keys | log-probability of these |",
        "|---|---|---|---|",
    ]
    for label, own in records.items():
        read = f"{sum(own['read']) / len(own['read']):,.0f}" if own["read"] else "–"
        _, right, likely = kept(dense, own["keys"])
        lines.append(f"| {label} | {read} | {right} | {likely:.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
