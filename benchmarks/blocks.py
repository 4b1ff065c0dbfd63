"""Whether some coarse codes can be left out: blocks of near keys, probed by their means.

    python -m benchmarks.blocks [--documents 3]     # needs SmolLM2: `make models`

Keys of a head are put in blocks of near ones, as an inverted file has them: halves of halves, each
cut across the direction in which its keys vary most, by what queries make of a difference. Each
query head looks into the blocks with the largest scores: that of the mean, or of the mean and so
many standard deviations of the scores within the block, as the query sees them. With the square
root of a block's rows less one no row of it scores more (Samuelson's inequality). Rows of these
blocks are then chosen from as `saap` does. Questions are those of `benchmarks.candidates`; figures
go to `$OUT`, else to `benchmarks/results/<device>/blocks.json`, and then into `docs/routing.md`.
"""

import argparse

import torch
from torch import Tensor

from saap import hf
from saap.eval.cli.demo_words import MODEL, document_with_keys
from saap.kernels.codes.layout import GROUPS
from saap.methods import find_method
from saap.methods.saap import SaapSearch

from .candidates import CONTEXT, Choice, ask, chosen_by, kept, of_each_head
from .cpu import cpu_name, environment
from .reports import ROOT, put_table, report_path, write

COMMAND = "python -m benchmarks.blocks"
ROUNDS = 3

# Rows of a block, share of the rows that each head looks into, standard deviations.
WAYS = ((32, 0.15, 0.0), (32, 0.15, 4.0), (32, 0.3, 4.0), (16, 0.25, 4.0), (8, 0.15, 2.5))
EVERY = "every row"

AS_SAAP = GROUPS, of_each_head(SaapSearch().least)  # groups of coordinates, candidates


def halves(x: Tensor, size: int, rows: Tensor) -> Tensor:
    """The rows in an order in which every `size` that follow one another are near each other."""
    if len(rows) <= size:
        return rows
    own = x[rows] - x[rows].mean(0)
    along = own[own.square().sum(1).argmax()]
    for _ in range(ROUNDS):
        along = torch.nn.functional.normalize(own.T @ (own @ along), dim=0)
    order = (own @ along).argsort()
    left = (-(-len(rows) // size) + 1) // 2 * size
    return torch.cat([halves(x, size, rows[part]) for part in (order[:left], order[left:])])


class Blocks:
    """Of the keys `x [n, P]`; `importance [P]`: what a difference counts in a score."""

    def __init__(self, x: Tensor, importance: Tensor, size: int):
        n, self.count = len(x), -(-len(x) // size)
        order = halves(x * importance.sqrt(), size, torch.arange(n))
        self.of_row = torch.empty(n, dtype=torch.long)
        self.of_row[order] = torch.arange(n) // size
        sizes = torch.bincount(self.of_row, minlength=self.count)[:, None]
        self.means = self._sums(x) / sizes
        self.variances = self._sums((x - self.means[self.of_row]).square()) / sizes

    def _sums(self, x: Tensor) -> Tensor:
        return torch.zeros(self.count, x.shape[1]).index_add_(0, self.of_row, x)

    def looked_at(self, q: Tensor, share: float, deviations: float, n: int) -> Tensor:
        """Rows that each of the heads `q [G, P]` looks into, bool `[G, n]`: those that came after
        the blocks were made, too."""
        scores = q @ self.means.T + deviations * (q.square() @ self.variances.T).sqrt()
        best = scores.topk(round(share * len(self.means)), -1).indices
        wanted = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, best, True)
        rows = torch.ones(len(q), n, dtype=torch.bool)
        rows[:, : len(self.of_row)] = wanted[:, self.of_row]
        return rows


class BlockChoice(Choice):
    """Of blocks that were made once of each layer's codes, the rows that `saap` would choose."""

    def __init__(self, size: int, share: float, deviations: float):
        super().__init__(*AS_SAAP)
        self.size, self.share, self.deviations = size, share, deviations
        self.blocks: dict[tuple, Blocks] = {}
        self.looked_at: list[float] = []

    def scores(self, selector, head, q, fine, coarse):
        place = id(selector.codes), head
        if place not in self.blocks:
            importance = selector.coordinates.importance[0, head]
            self.blocks[place] = Blocks(fine, importance, self.size)
        rows = self.blocks[place].looked_at(q, self.share, self.deviations, len(fine))
        self.looked_at.append(float(rows.any(0).float().mean()))
        return super().scores(selector, head, q, fine, coarse).masked_fill(~rows, -torch.inf)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=3, help="each with six keys")
    options = parser.parse_args()
    model, tokenizer = hf.load_model(MODEL), hf.load_tokenizer(MODEL)
    records, dense = {}, []
    for seed in range(options.documents):
        tokens, pairs = document_with_keys(tokenizer, CONTEXT - 64, seed)
        read = hf.read_context(model, tokens, chunk=1024)
        dense += ask(model, tokenizer, read, pairs, find_method("dense")())
        choices = {EVERY: Choice(*AS_SAAP)}
        for size, share, deviations in WAYS:
            label = f"{share:.0%} of the blocks of {size}, {deviations:g} deviations"
            choices[label] = BlockChoice(size, share, deviations)
        for label, choice in choices.items():
            with chosen_by(choice):
                keys = ask(model, tokenizer, read, pairs, find_method("saap")())
            shares = getattr(choice, "looked_at", [1.0])
            own = records.setdefault(label, {"keys": [], "looked_at": []})
            own["keys"] += keys
            own["looked_at"].append(sum(shares) / len(shares))
            print(f"document {seed}, {label}: {sum(right for right, _ in keys)}", flush=True)
        write(
            report_path(cpu_name(), "blocks.json"),
            {"environment": environment(), "context": CONTEXT, "dense": dense, "records": records},
        )
        put_table(ROOT / "docs" / "routing.md", COMMAND, table(dense, records))


def table(dense: list, records: dict) -> str:
    """Log-probabilities are of the keys that dense attention answers."""
    known, *_ = kept(dense, dense)
    lines = [
        f"| each head looks into | coarse codes read | of {known} keys | log-probability |",
        "|---|---:|---:|---:|",
    ]
    for label, own in records.items():
        looked_at = sum(own["looked_at"]) / len(own["looked_at"])
        _, right, likely = kept(dense, own["keys"])
        lines.append(f"| {label} | {looked_at:.0%} | {right} | {likely:.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
