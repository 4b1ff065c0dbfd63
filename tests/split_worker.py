"""One rank of the tests of a split context: `python tests/split_worker.py SCENARIO FOLDER`.

Writes what it found to `FOLDER/RANK.pt`. Run without a group by `tests/test_distributed.py`, too.
"""

import os
import signal
import sys
from pathlib import Path

import torch

from saap import distributed
from saap.budget import Budget
from saap.distributed import store as split_store
from saap.kv import KVStore
from saap.methods import find_method
from saap.selector import LayerInfo

HEADS, N_KV, DIM = 6, 2, 64
STORE_BUDGET = Budget(max_tokens=64, n_sink=20, window=48, estimate_rest=False)


def store_steps(
    group, n: int, parts, method="saap", share="group", chunks=(700, 3, 500), steps=40,
    estimate=False,
):  # fmt: skip
    """Outputs, lse and chosen tokens of each step of one layer over random vectors."""
    torch.manual_seed(3)
    budget = Budget(max_tokens=64, n_sink=20, window=48, share=share, estimate_rest=estimate)
    search = {"least": 128, "width": 2.0}
    selector = _selector(method, search)
    if group is None:
        store = RecordingStore(selector, budget)
    else:
        store = distributed.SplitStore(selector, budget, group, parts)
    spread = torch.linspace(3, 0.2, DIM)
    found = []
    lengths = [*chunks, n - sum(chunks)] + [1] * steps
    sent = 0
    for length in lengths:
        k, v = torch.randn(2, 1, N_KV, length, DIM)
        q = torch.randn(1, HEADS, length, DIM) * spread
        store.append(k * torch.linspace(1, 0.5, DIM), v, k)
        before = 0 if group is None else group.bytes_sent
        out, lse = store.attend(q, q)
        if group is not None:
            sent = group.bytes_sent - before
        found.append({"out": out, "lse": lse})
        if length == 1:
            found[-1]["tokens"] = _visited(store, group)
            found[-1]["sent"] = sent
    return found


def single(n: int, **given):
    """The steps of one process."""
    return store_steps(None, n, None, **given)


def _selector(method, search):
    from saap.methods.saap import Saap, SaapSearch

    layer = LayerInfo(sm_scale=DIM**-0.5)
    if method == "saap":
        return Saap(search=SaapSearch(**search)).selector(layer)
    return find_method(method)().selector(layer) if method != "dense" else None


class RecordingStore(KVStore):
    """Keeps the ranges of its latest step."""

    visited = None

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        complete = self._steps.ranges.complete

        def kept(*arguments):
            self.visited = complete(*arguments)
            return self.visited

        self._steps.ranges.complete = kept


def _visited(store, group) -> list[list[int]]:
    """Tokens visited by each head in the last step, of this rank."""
    own = store if group is None else store.own
    first = 0 if group is None else store._tokens[0]
    if own is None or not own.length:
        return []
    starts, counts = own.visited
    tokens = []
    for head in range(counts.shape[1]):
        rows = [
            row
            for s, n in zip(starts[0, head].tolist(), counts[0, head].tolist(), strict=False)
            for row in range(s, s + n)
        ]
        tokens.append(sorted(first + int(own.rows.tokens[0, head % N_KV, r]) for r in rows))
    return tokens


def main() -> None:
    split_store.KVStore = RecordingStore
    scenario, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    with distributed.joined(timeout=90) as group:
        SCENARIOS[scenario](group, folder)


def two_ranks(group, folder) -> None:
    """Layers, a model, what is refused; at last the ranks give the model other texts."""
    found = {
        "stores": {
            "even": store_steps(group, 1500, None, chunks=(1400,), steps=20),
            "ragged": store_steps(group, 1500, [1033], steps=20),
            "head": store_steps(group, 1500, [1033], share="head", steps=8),
            "dense": store_steps(group, 1500, None, method="dense", steps=2),
            "long": store_steps(group, 6000, None, chunks=(1400,), steps=2),
            "rest": store_steps(group, 1500, [1033], steps=20, estimate=True),
            "rest by head": store_steps(group, 1500, [1033], share="head", steps=2, estimate=True),
        },
        "even": generate(group, new=48),
        "dense": generate(group, method="dense", new=6, n=400),
        "ragged": generate(group, parts=[1100], chunk=512, new=24),
        "refused": {name: refusal(group, **given) for name, given in REFUSED.items()},
    }
    torch.save(found, folder / f"{group.rank}.pt")
    if sys.argv[3:] == ["slow"]:
        torch.save(generate(group, new=256), folder / f"slow{group.rank}.pt")
    generate(group, new=2, n=1800 - group.rank)


def four_ranks(group, folder) -> None:
    """A ragged split; at last a rank is killed while the others go on."""
    parts = [137, 900, 450]
    found = {
        "ragged": store_steps(group, 1500, parts, steps=12),
        "rest": store_steps(group, 1500, parts, steps=12, estimate=True),
    }
    torch.save(found, folder / f"{group.rank}.pt")
    group.add(torch.zeros(1))
    if group.rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    store_steps(group, 1500, None)


def refusal(group, **given) -> str:
    """The error of a block in which rank 1 has other values than rank 0."""
    own = {name: values[group.rank] for name, values in given.items()}
    try:
        generate(group, new=1, **own)
    except (distributed.GroupError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "not refused"


REFUSED = {
    "budget": {"budget": [Budget(max_tokens=64), Budget(max_tokens=65)]},
    "context": {"n": [1, 1]},
    "parts": {"parts": [[5, 5], [5, 5]]},
    "method": {"method": ["quest", "quest"]},
    "methods": {"method": ["saap", "dense"]},
    "version": {"version": ["0.1.0", "0.2.0"]},
    "model": {"factor": [1.0, 1.1]},
    "beams": {"num_beams": [2, 2]},
}
SCENARIOS = {"two_ranks": two_ranks, "four_ranks": four_ranks}


def generate(
    group, *, parts=None, chunk=None, new=64, n=1800, budget=None, method="saap",
    version="0.1.0", factor=1.0, num_beams=1,
):  # fmt: skip
    """Greedy tokens of the reference model over a prompt of n tokens."""
    import saap
    from saap import hf
    from saap.eval import reference
    from saap.eval.tasks.answering import encode
    from saap.hf import agreement

    model, tokenizer = (load(reference.FOLDER) for load in (hf.load_model, hf.load_tokenizer))
    model.model.layers[0].self_attn.q_proj.weight.data *= factor
    agreement.__version__ = version
    tokens = encode(tokenizer, reference.split_held_out()[1][: 2 * n])[None, :n]
    budget = budget or Budget(max_tokens=128, n_sink=16, window=64)
    with (
        saap.attached(model, budget=budget, method=method, group=group) as attached,
        torch.no_grad(),
    ):
        cache = attached.cache() if parts is None else attached.cache(parts=parts)
        for start in range(0, n - 1 if chunk else 0, chunk or n):
            model(tokens[:, start : min(start + chunk, n - 1)], **hf.over(cache))
        found = model.generate(
            tokens, **hf.over(cache), max_new_tokens=new, min_new_tokens=new,
            do_sample=False, num_beams=num_beams,
        )  # fmt: skip
        visited = sum(layer.store.visited_rows for layer in cache.saap_layers)
    return {"tokens": found[0, n:].tolist(), "visited": visited, "bytes": cache.nbytes}


if __name__ == "__main__":
    main()
