"""Where keys and queries lie, and how full the buckets are: why centroids mislead.

Not a contest of methods: records are pictures' material. For the heads that look farthest, the
first two principal components of de-RoPEd keys and queries together, and sizes of the lists that
the trained partition makes of this context.
"""

import torch

from saap import hf
from saap.budget import Budget
from saap.index.kmeans import assign

from .attention import LayerProblem
from .base import Task, text_tokens

N_POINTS, N_HEADS, N_SINK, WINDOW = 300, 3, 16, 256


class Geometry(Task):
    name, budgets = "geometry", None

    def n_units(self, config):
        return 1

    @torch.no_grad()
    def run_unit(self, bench, context, number):
        config = bench.config
        n_queries = min(N_POINTS, context // 8)
        tokens = text_tokens(bench.tokenizer, bench.text, context, 0, config.n_texts)
        read = hf.read_context(bench.model, tokens, n_queries=n_queries)
        layout = Budget(max_tokens=0, n_sink=N_SINK, window=min(WINDOW, context // 8))
        index = next((a.method.index for a in bench.variants if a.method.index is not None), None)
        found = []
        for layer in (own.info for own in hf.model_layers(bench.model) if own.is_full):
            problem = LayerProblem(read, layer, layout)
            mass = (problem.middle[1] - problem.exact[1]).exp().mean(0)
            for head, share in enumerate(mass.tolist()):
                found.append((share, layer.number, head, problem))
        found.sort(key=lambda f: -f[0])
        records = [head_record(*f, index) for f in found[:N_HEADS]]
        return records, bytes(tokens.to(torch.int32).numpy())


def head_record(share, layer, head, problem: LayerProblem, index) -> dict:
    kv_head = head * problem.n_kv // problem.q_rope.shape[1]
    middle = problem.k_derope[0, kv_head, problem.first : problem.stop].float()
    keys = middle[torch.linspace(0, len(middle) - 1, min(N_POINTS, len(middle))).long()]
    queries = problem.q_derope[:, head].float()
    both = torch.cat([keys, queries])
    centred = both - both.mean(0)
    _, strengths, axes = torch.linalg.svd(centred, full_matrices=False)
    points = centred @ axes[:2].T
    record = {
        "layer": layer,
        "head": head,
        "middle_mass_share": round(share, 4),
        "explained": round(float((strengths[:2] ** 2).sum() / (strengths**2).sum()), 4),
        "keys": [[round(x, 3) for x in p] for p in points[: len(keys)].tolist()],
        "queries": [[round(x, 3) for x in p] for p in points[len(keys) :].tolist()],
    }
    if index is not None:
        centroids = index.layers[layer].centroids
        buckets = assign(middle[None], centroids[kv_head : kv_head + 1])[0].long()
        sizes = torch.bincount(buckets, minlength=centroids.shape[1])
        record["bucket_sizes"] = sorted(sizes.tolist(), reverse=True)
    return record
