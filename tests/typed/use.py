"""The public names as a typed program uses them: `make types` checks it, nothing runs it."""

from typing import assert_type

import torch
from torch import Tensor, nn

import saap
from saap import hf


def kernels(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, lengths: Tensor) -> Tensor:
    out, lse = saap.attend_ranges(q, k, v, starts, lengths, sm_scale=0.1, impl="numba")
    other = saap.attend_dense(q, k, v, lengths[:, 0, 0])
    merged, _ = saap.merge_states(out, lse, *other)
    assert_type(merged, Tensor)
    prefix, _ = saap.attend_shared_prefix(q, k[0], v[0], k, v, starts, lengths)
    return merged + prefix


def store(k: Tensor, v: Tensor, q: Tensor) -> Tensor:
    selector: saap.Selector = saap.METHODS["saap"]().selector(saap.LayerInfo(sm_scale=0.125))
    own = saap.KVStore(selector, saap.Budget(max_tokens=512), capacity=8192)
    own.append(k, v, k)
    out, lse = own.attend(q, q)
    assert_type(lse, Tensor)
    assert_type(own.visited_share, float)
    assert_type(own.lengths, list[int])
    return out


def generate(model: nn.Module, index: saap.TrainedIndex | None, tokens: Tensor) -> Tensor:
    budget = saap.Budget.for_selectivity(0.05, 8192, n_sink=4, window=256)
    prefill = saap.PrefillBudget(visited=0.1)
    with saap.attached(
        model, index, budget, method="saap", kv_dtype=torch.bfloat16, prefill=prefill
    ) as saap_model:
        cache = saap_model.cache(8192)
        assert_type(cache.lengths, list[int])
        saap_model.save_context(cache, tokens, "context.st")
        again, held = saap_model.open_context("context.st")
        assert_type(again.nbytes, int)
        return held


def train(model: nn.Module, texts: list[Tensor]) -> saap.TrainedIndex:
    def progress(what: str, done: int, total: int) -> None:
        print(what, done, total)

    index = saap.train(model, texts, nlist=64, router="mlp", progress=progress)
    index.save("index.st")
    assert_type(index.nlist, int)
    return saap.TrainedIndex.load("index.st")


def partition(keys: Tensor, inv_freq: Tensor) -> saap.LayerRouting:
    return saap.partition_keys(keys, inv_freq, sm_scale=0.125, nlist=32)


def load(name: str) -> nn.Module:
    return hf.load_model(name)
