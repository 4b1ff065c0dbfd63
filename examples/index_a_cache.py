"""Index the keys of a KV cache, search them, grow the index, save it and open it again.

    python examples/index_a_cache.py [--tokens 4096] [--out index.safetensors]

Keys and queries are those of the shipped reference model on held-out text: the first tokens are
the context, the last 64 ask. Buckets are made of keys without RoPE, scores are taken with it.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch

from saap import hf
from saap.eval import reference
from saap.eval.tasks.answering import encode
from saap.index.faiss_backend import flat_search
from saap.index.ivf import AsymmetricIVF

N_QUERIES, TOP_K = 64, 100
LAYER = 2


def recall(found: torch.Tensor, true: torch.Tensor) -> float:
    """Share of the true top-k positions that were found; both `[n, Hq, k]`."""
    pairs = zip(found.flatten(0, 1), true.flatten(0, 1), strict=True)
    return torch.stack([torch.isin(t, f).float().mean() for f, t in pairs]).mean().item()


def exact_top_k(keys: torch.Tensor, q: torch.Tensor, k: int) -> torch.Tensor:
    """Positions of the k best keys by FAISS's flat index, `[n, Hq, k]`."""
    heads = q.unflatten(1, (len(keys), -1))
    ids = [flat_search(own, heads[:, h].flatten(0, 1), k)[1] for h, own in enumerate(keys)]
    return torch.cat([i.unflatten(0, (len(q), -1)) for i in ids], 1)


def captured(model, tokenizer, text: bytes, n_tokens: int):
    """Keys `[Hkv, N, D]` and queries `[n, Hq, D]` of one layer, each with RoPE and without."""
    tokens = encode(tokenizer, text[: 8 * n_tokens])[:n_tokens]
    read = hf.read_context(model, tokens, n_queries=N_QUERIES)
    k_rope, _, k_derope = read.keys(LAYER)
    n_context = n_tokens - N_QUERIES
    return (k_rope[0, :, :n_context], k_derope[0, :, :n_context]), read.queries[LAYER]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--out", type=Path, help="keep the index file")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = hf.load_model(reference.FOLDER)
    tokenizer = hf.load_tokenizer(reference.FOLDER)
    training_text, text = reference.split_held_out()
    (k, k_derope), (q, q_derope) = captured(model, tokenizer, text, options.tokens)
    (xt_score, xt), _ = captured(model, tokenizer, training_text, options.tokens)
    n_kv, n, d = k.shape
    print(f"layer {LAYER}: {n} keys x {n_kv} KV heads x {d}; {q.shape[1]} query heads")

    # Train on another text: the partition and the router know nothing of this context.
    nlist = max(16, options.tokens // 32)
    xq_score, xq_train = training_queries(model, tokenizer, training_text, options.tokens)
    index = AsymmetricIVF(d, n_kv, nlist, flush_every=256)
    index.train(
        xt, xq_train, router="mlp", xt_score=xt_score, xq_score=xq_score, steps=300, hidden=64
    )
    index.add(k, route_by=k_derope)
    index.flush()
    statistics = index.statistics()
    print(
        f"{index.ntotal} keys in {nlist} buckets, {index.nbytes / 1e6:.1f} MB; largest "
        f"{int(statistics.sizes.max())}, imbalance {statistics.imbalance.mean():.2f}"
    )

    true = exact_top_k(k, q, TOP_K)
    plain = AsymmetricIVF.from_trained(index.centroids)
    plain.add(k, route_by=k_derope)
    plain.flush()
    print(f"\nrecall of the true top {TOP_K}, each query head on its own")
    print("  nprobe   keys visited   router   nearest centroids")
    for nprobe in sorted({max(1, nlist // 16), nlist // 8, nlist // 4, nlist}):
        rows = index.select(q_derope, nprobe=nprobe, share="head")[1].sum(-1).float().mean()
        found = [
            recall(own.search(q, TOP_K, nprobe, route_by=q_derope, share="head")[1], true)
            for own in (index, plain)
        ]
        print(f"  {nprobe:6d}   {rows / n:12.1%}   {found[0]:6.1%}   {found[1]:17.1%}")

    with tempfile.TemporaryDirectory() as folder:
        path = options.out or Path(folder) / "index.safetensors"
        index.save(path)
        begin = time.perf_counter()
        opened = AsymmetricIVF.load(path)
        spent = 1e3 * (time.perf_counter() - begin)
        same = all(
            torch.equal(a, b)
            for a, b in zip(
                index.search(q, TOP_K, nlist // 8, route_by=q_derope),
                opened.search(q, TOP_K, nlist // 8, route_by=q_derope),
                strict=True,
            )
        )
        print(
            f"\nsaved {path.stat().st_size / 1e6:.1f} MB, opened in {spent:.1f} ms, same: {same}"
        )

    opened.add(k[:, :1], route_by=k_derope[:, :1])  # one more token, at the next position
    print(f"grown to {opened.ntotal} keys, {opened.n_pending} not in a bucket yet")


def training_queries(model, tokenizer, text: bytes, n_tokens: int):
    """The second half of a text's queries, `[Hq, m, D]`, with RoPE and without."""
    tokens = encode(tokenizer, text[: 8 * n_tokens])[:n_tokens]
    read = hf.read_context(model, tokens, n_queries=n_tokens // 2)
    return tuple(q.transpose(0, 1) for q in read.queries[LAYER])


if __name__ == "__main__":
    main()
