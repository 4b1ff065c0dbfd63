"""What the tests of lossless decoding share."""

import copy

import torch
from transformers.generation.streamers import BaseStreamer

import saap
from saap.budget import Budget
from saap.hf import Verify
from saap.hf.cache_argument import NAME

from .test_generate import SMALL, make, prompt, random_index

FIXED = Verify(4, adapt=False)
NEW = 24
METHODS = {
    "quest": Budget(max_tokens=8, n_sink=4, window=8, flush_every=4),
    "streaming": Budget(max_tokens=0, n_sink=4, window=8, flush_every=1),
    "kmeans": Budget(max_tokens=8, n_sink=4, window=8, flush_every=4),
    # Without an estimate, so that some drafts are wrong.
    "saap": Budget(max_tokens=8, n_sink=4, window=8, estimate_rest=False),
}


def small_llama():
    model = make("llama")
    return model, random_index(model)


def inputs_of(tokens, padding=0):
    mask = (torch.arange(tokens.shape[1]) >= padding)[None].long()
    return {"input_ids": tokens, "attention_mask": mask}


def attached(model, index=None, budget=SMALL, method="blend", verify=FIXED):
    return saap.attached(model, index, budget, method=method, verify=verify)


class Kept(BaseStreamer):
    """Keeps what is streamed; may break off after so many tokens."""

    def __init__(self, most=None):
        self.tokens, self.most = [], most

    def put(self, value):
        self.tokens.append(value.flatten().tolist())
        if len(self.tokens) - 1 == self.most:
            raise KeyboardInterrupt

    def end(self):
        self.tokens.append("end")


def batch_of(lengths, seed=0):
    """Prompts of these lengths, padded on the left."""
    width = max(lengths)
    mask = torch.stack([(torch.arange(width) >= width - n).long() for n in lengths])
    return {"input_ids": prompt(len(lengths), width, seed=seed), "attention_mask": mask}


def assert_batch_holds(model, cache, ids, lengths, n_prompt):
    """As `assert_holds`, each sequence by itself."""
    for b, n in enumerate(lengths):
        own = copy.deepcopy(cache)
        own.batch_select_indices(torch.tensor([b]))
        assert_holds(model, own, ids[b : b + 1], n_prompt - n)


def assert_holds(model, cache, ids, padding=0):
    """The cache holds all of `ids [1, N]` but the last, as an exact forward would have it."""
    n = ids.shape[1] - 1
    assert cache.get_seq_length() == n
    assert cache.lengths == [n - padding]
    assert cache.last_positions == [n - padding - 1]
    with torch.no_grad():
        plain = model(ids[:, padding:], use_cache=True)[NAME]
    for layer, dense in zip(cache.layers, plain.layers, strict=True):
        if not hasattr(layer, "store"):
            assert layer.get_seq_length() == n
            assert not layer.record_past
            expected = dense.keys[:, :, : dense.keys.shape[2] - 1][:, :, -10:]
            assert torch.allclose(layer.keys[:, :, -10:], expected, atol=1e-4)
            continue
        store = layer.store
        order = store.rows.tokens[:, :, : n - padding].long().argsort(-1)
        keys = store.k[:, :, : n - padding].gather(
            2, order.unsqueeze(-1).expand(-1, -1, -1, store.k.shape[-1])
        )
        assert torch.allclose(keys, dense.keys[:, :, : n - padding], atol=1e-4)
        assert store.middles[0] <= store.budget.rows_in_lists(n - padding)
