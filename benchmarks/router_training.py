"""Other ways to train the router, on the reference model: a table of `docs/partitions.md`.

    python -m benchmarks.router_training [--texts 6]

One training per number of buckets; the networks are fitted to the same targets in every way.
Measured as in `benchmarks.routing_ideas`, in the blend that is the default. Raw figures go to
`$OUT`, else to `benchmarks/results/<device>/router_training.json` and from there into the page.
"""

import argparse
import copy
import json
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from saap import hf
from saap.eval import reference
from saap.index import fitting
from saap.index.routers import MLPRouter
from saap.training import layer as layer_training
from saap.training import train

from .cpu import cpu_name, environment
from .reports import put_table, report_path, write
from .routing import CONTEXT, PAGE, held_out_texts, training_texts
from .routing_ideas import (
    SHARE,
    Case,
    cases_of,
    chosen_rows,
    outcome,
    rows_of_middle,
    usual,
    weight_a_key,
)

COMMAND = "python -m benchmarks.router_training"
N_LISTS = (128, 256, 512)
AS_IT_IS = "**as it is**: 64 hidden, 400 steps"


def largest_only(mass: Tensor) -> Tensor:
    """All of a query's mass in the middle counts for the bucket that holds most of it."""
    middle = mass[..., :-1].float()
    hard = torch.zeros_like(middle).scatter_(
        -1, middle.argmax(-1, keepdim=True), middle.sum(-1, keepdim=True)
    )
    return torch.cat([hard, mass[..., -1:].float()], -1)


def middle_alone(mass: Tensor) -> Tensor:
    """Every query counts alike, whatever it leaves to the middle."""
    middle = mass[..., :-1].float()
    middle = middle / middle.sum(-1, keepdim=True).clamp(min=1e-6)
    return torch.cat([middle, torch.zeros_like(mass[..., -1:]).float()], -1)


def fitted_in_all_ways(targets, options) -> dict[str, MLPRouter]:
    q, mass, sizes, block_of = targets.q, targets.mass, targets.sizes, targets.block_of

    def fit(mass=mass, sizes=sizes, block_of=block_of, q=q, hidden=64, steps=400):
        return fitting.fit_mlp(
            q, mass, sizes, block_of, hidden=hidden, steps=steps, seed=options.seed
        )

    n_kv = len(sizes)
    together = q.unflatten(0, (n_kv, -1)).transpose(1, 2).flatten(2)  # [Hkv, n, G * D]
    return {
        AS_IT_IS: fit(),
        "32 hidden": fit(hidden=32),
        "128 hidden": fit(hidden=128),
        "200 steps": fit(steps=200),
        "800 steps": fit(steps=800),
        "mass per bucket, whatever its size": fit(sizes=None, block_of=None),
        "the largest bucket of each query alone": fit(mass=largest_only(mass)),
        "every query alike": fit(mass=middle_alone(mass)),
        "one network a KV group, 64 hidden": fit(
            q=together, mass=mass.float().unflatten(0, (n_kv, -1)).mean(1)
        ),
    }


def with_router(case: Case, router: MLPRouter) -> Case:
    changed = copy.copy(case)
    changed.logits = router.logits(case.q).unflatten(1, case.logits.shape[1:3])
    return changed


def group_weights(case: Case, router: MLPRouter) -> Tensor:
    """A network for a whole KV group, blended with the group's turned centroids."""
    n_kv, group = case.logits.shape[1:3]
    q = case.q.unflatten(1, (n_kv, group)).flatten(2)
    logits = router.logits(q)[..., :-1]
    turned = weight_a_key(case, 0.0, 1.0).sum(2)
    segments = turned.shape[-1] // logits.shape[-1]
    blend = 0.5 * logits.repeat_interleave(segments, -1) + 0.5 * turned.clamp(min=1e-30).log()
    return blend.exp().masked_fill(case.sizes == 0, 0.0)


def table(found: dict[str, dict]) -> str:
    lines = [
        f"| network, at {SHARE:.0%} of {CONTEXT:,} tokens | recall of the middle | output error "
        "| kB per layer in 8 bits |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {r['recall_middle']:.1%} | {r['output_error']:.4f} | {r['kilobytes']:.0f} |"
        for name, r in found.items()
    ]
    return "\n".join(lines)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=int, default=6)
    parser.add_argument("--report", type=Path, help="make the table from this one")
    options = parser.parse_args()
    if options.report:
        put_table(PAGE, COMMAND, table(json.loads(options.report.read_text())["ways"]))
        return
    model, sequences = hf.load_model(reference.FOLDER), training_texts()
    texts = held_out_texts(options.texts)
    found: dict[str, dict] = {}
    plain = layer_training.fit_routers
    for nlist in sorted(N_LISTS, key=lambda n: n != 256):
        ways: list[dict[str, MLPRouter]] = []

        def fit(targets, training, report, ways=ways, nlist=nlist):
            if nlist == 256:
                ways.append(fitted_in_all_ways(targets, training))
            return plain(targets, training, report)

        with mock.patch.object(layer_training, "fit_routers", fit):
            index = train(model, sequences, nlist=nlist)
        cases = [case for tokens in texts for case in cases_of(model, tokens, index)]
        if nlist != 256:
            size = index.layers[0].router("mlp").nbytes
            found[f"{nlist} buckets"] = outcome(cases, usual) | {"kilobytes": size / 1e3}
        for name in ways[0] if ways else ():
            of_layer = [own[name] for own in ways]
            if "group" in name:
                result = outcome(
                    cases,
                    lambda c, of_layer=of_layer: chosen_rows(
                        c, group_weights(c, of_layer[c.layer]), rows_of_middle()
                    ),
                )
            else:
                result = outcome([with_router(c, of_layer[c.layer]) for c in cases], usual)
            size = of_layer[0].quantized().nbytes
            found[name] = result | {"kilobytes": size / 1e3}
            print(name, found[name], flush=True)
    report = {"environment": environment(), "ways": found}
    write(report_path(cpu_name(), "router_training.json"), report)
    put_table(PAGE, COMMAND, table(found))
    print(table(found))


if __name__ == "__main__":
    main()
