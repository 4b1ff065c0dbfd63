"""Random steps of a KV store: at full budget dense attention over what they left, at others this
over the visited rows and the estimate of all others."""

from dataclasses import replace

import pytest
import torch

import saap
from saap.budget import Budget
from saap.kernels.attention import dequantize_rows, quantize_rows
from saap.kernels.rest import Moments, Scored
from saap.kernels.rest.reference import add_rest
from saap.kv import KVStore, attend_chunk, state
from saap.kv.ranges import LOCAL
from saap.kv.rest import clustered, counted, sample_step
from saap.kv.row_sums import Clusters, RowSums
from saap.methods.saap import SaapSelector

from ..conftest import random_model
from ..test_generate import random_index
from .hostile import canaries, cases, torch_seed

pytestmark = pytest.mark.bad_input
HKV, HQ, DIM = 2, 4, 16
METHODS = ("blend", "quest", "kmeans", "moments-pages", "saap", "oracle-tokens", None)


def scored_of(scored: Scored | None, b: int) -> Scored | None:
    """That of one sequence."""
    if scored is None:
        return None
    mean = scored.mean if len(scored.mean) == 1 else scored.mean[b : b + 1]
    parts = scored.lse[b : b + 1], mean, scored.n_scored[b : b + 1]
    return replace(scored, **dict(zip(("lse", "mean", "n_scored"), parts, strict=True)))


@pytest.fixture(scope="module")
def selectors():
    from saap import hf
    from saap.methods import find_method

    model = random_model("llama")
    index, layer = random_index(model), hf.model_layers(model)[0].info

    def make(name):
        found = None if name is None else find_method(name)(index).selector(layer)
        if isinstance(found, SaapSelector):
            found.least_rows = 20  # stores here are short
        return found

    return make


class Twin:
    """A store, and what it has to hold: `k, v [Hkv, n, D]` of each sequence."""

    def __init__(self, own, selector, budget, kv_dtype):
        self.own, self.generator = own, torch_seed(own)
        self.store, self.held = KVStore(selector, budget, kv_dtype=kv_dtype), []

    def random(self, *shape):
        return torch.randn(*shape, generator=self.generator)

    def lengths(self, batch):
        return self.store.lengths or [0] * batch

    def append(self):
        batch = len(self.held) or self.own.choice((1, 1, 2, 3))
        n = self.own.choice((1, 1, 1, 1, 2, 7, 30, 100))
        k, v = self.random(2, batch, HKV, n, DIM)
        mask = None
        if n > 1 and self.own.random() < 0.3:
            padding = [0 if held else self.own.randrange(n) for held in self.lengths(batch)]
            mask = torch.arange(n) >= torch.tensor(padding)[:, None]
        q = self.random(batch, HQ, n, DIM)
        in_one = n == 1 and mask is None and self.own.random() < 0.7
        with canaries():
            if in_one:
                found = self.store.step(k, v, k, q, q)
            else:
                self.store.append(k, v, k, mask)
                found = self.store.attend(q, q)
            out, lse = (t.clone() for t in found)
        if self.store.kv_dtype == torch.int8:
            k, v = (dequantize_rows(quantize_rows(t)) for t in (k, v))
        self.held = self.held or [(k[0, :, :0], v[0, :, :0])] * batch
        new = [n] * batch if mask is None else mask.sum(1).tolist()
        self.held = [
            tuple(
                torch.cat([old, t[b, :, n - m :]], 1) for old, t in zip(pair, (k, v), strict=True)
            )
            for b, (pair, m) in enumerate(zip(self.held, new, strict=True))
        ]
        for b, ((hk, hv), m) in enumerate(zip(self.held, new, strict=True)):
            true = attend_chunk(q[b : b + 1, :, n - m :], hk[None], hv[None], sm_scale=DIM**-0.5)
            for got, exact in zip((out, lse), true, strict=True):
                assert (got[b : b + 1, :, n - m :] - exact).abs().max() < 1e-4

    def ask(self):
        """Under another budget, which has no effect on later steps: all sinks, all of the tail,
        and no row twice."""
        store, budget = self.store, self.store.budget
        if not self.held or not all(store.lengths):
            return
        small = replace(budget, max_tokens=self.own.choice((0, 1, 5, 40)))
        if isinstance(store.selector, SaapSelector) and self.own.random() < 0.5:
            small = replace(small, min_weight=self.own.choice((1e-9, 0.01, 0.2, 10.0)))
        q = self.random(len(self.held), HQ, DIM)
        with canaries():
            starts, lengths = (t.clone() for t in store.select(q, q, small))
        for b, n in enumerate(store.lengths):
            local = {*range(min(n, budget.n_sink)), *range(budget.n_sink + store.middles[b], n)}
            for h in range(HKV):
                pairs = zip(starts[b, h].tolist(), lengths[b, h].tolist(), strict=True)
                rows = [row for s, m in pairs for row in range(s, s + m)]
                assert len(rows) == len(set(rows)) <= n
                assert local <= set(rows) <= set(range(n))
                assert len(rows) <= len(local) + small.max_tokens or starts.shape[2] == 1

    def estimate(self):
        """However rows came: what is estimated depends on those that are there."""
        store, budget = self.store, self.store.budget
        if not self.held or not all(store.lengths):
            return
        small = replace(budget, max_tokens=self.own.choice((0, 1, 5, 40)))
        q = self.random(len(self.held), HQ, DIM) * self.own.choice((0.1, 1.0, 3.0))
        starts, lengths = (t.clone() for t in store.select(q, q, small))
        found = saap.attend_ranges(q, store.k, store.v, starts, lengths)
        visited = [t.clone() for t in found]
        with canaries():
            add = store.adds_rest(small, lengths, DIM**-0.5, None)
            found = found if add is None else add(*found, q)
        best = store.selector is not None and store.selector.visits_best
        assert (add is not None) == (best and any(store.middles))
        for b, n in enumerate(store.middles if add is not None else ()):
            if n == 0:
                assert torch.equal(found[0][b], visited[0][b])
                continue
            rows = torch.cat(self.held[b], -1)[:, budget.n_sink :][:, : counted(n)]
            sample = rows[:, : clustered(counted(n))]
            sums = RowSums(Clusters.of(sample[:, :: sample_step(sample.shape[1])]))
            sums.add(rows)
            parts = {name: t[None].double() for name, t in sums.moments().items()}
            moments = Moments(**parts, n_rows=torch.tensor([n]))
            true = add_rest(
                *(t[b : b + 1].double() for t in (*visited, q)), moments,
                lengths[b : b + 1, :, LOCAL:], scored_of(store.selector.left_out, b), DIM**-0.5,
                small.max_tokens, 0.0,
            )  # fmt: skip
            for got, exact in zip(found, true, strict=True):
                # Covariances and the clusters' means are kept with 8 bits.
                assert (got[b] - exact[0]).abs().max() < 0.02 * (1 + exact.abs().max())

    def flush(self):
        self.store.flush()

    def truncate(self):
        least = self.store.budget.n_sink
        dropped = [
            self.own.choice((0, max(0, min(self.own.randrange(40), n - min(n, least))), n))
            for n in self.store.lengths
        ]
        self.store.truncate(dropped)
        self.held = [
            tuple(t[:, : t.shape[1] - d] for t in pair)
            for pair, d in zip(self.held, dropped, strict=True)
        ]

    def select(self):
        if not self.held:
            return
        batch = len(self.held)
        chosen = [self.own.randrange(batch) for _ in range(self.own.choice((batch, 1, batch + 1)))]
        chosen = chosen[:4]
        self.store.select_sequences(chosen)
        self.held = [self.held[i] for i in chosen]

    def save(self, make):
        if not self.held or not any(self.store.lengths):
            return
        header, tensors = state.saved(self.store)
        tensors = {name: t.clone() for name, t in tensors.items()}
        self.store = state.restored(
            header, tensors, make(), self.store.budget, self.store.kv_dtype
        )

    def wrong(self):
        """What is to be refused, and to leave everything as it was."""
        before, batch = list(self.store.lengths), len(self.held) or 1
        good = torch.zeros(batch, HKV, 2, DIM)
        others = [good[:, :, :0], good[0], good[:0]]
        if self.held:  # the first append may bring any of these
            others += [good[..., :8], good[:, :1].expand(-1, 5, -1, -1)]
            others += [good.double()] * (self.store.kv_dtype is None)  # narrow rows take any
        other = self.own.choice(others)
        attempts = (
            lambda: self.store.append(other, other, other),
            lambda: self.store.append(good, other, good),
            lambda: self.store.append(good, good, good, torch.zeros(batch, 3).bool()),
            lambda: self.store.truncate([n + 1 for n in before] or [1]),
            lambda: self.store.select_sequences([len(before)] if before else [0, None]),
            lambda: self.store.attend(good[:, :, :0], good[:, :, :0]),
        )
        attempt = self.own.choice(attempts)
        with pytest.raises((ValueError, TypeError, RuntimeError)):
            attempt()
        assert self.store.lengths == before


def test_store_steps(selectors):
    for own, counts in cases("store steps", 12):
        name = own.choice(METHODS)
        budget = Budget(
            max_tokens=10**6, n_sink=own.choice((0, 1, 4)), window=own.choice((1, 8, 20)),
            flush_every=own.choice((None, 1, 8, 16)),
        )  # fmt: skip
        twin = Twin(own, selectors(name), budget, own.choice((None, None, torch.int8)))
        for _ in range(own.choice((5, 20, 60))):
            step = own.choice(
                ("append",) * 12
                + ("ask", "ask", "estimate", "flush", "truncate", "select", "save", "wrong")
            )
            if step == "save":
                twin.save(lambda name=name: selectors(name))
            else:
                getattr(twin, step)()
            counts["steps"] = counts.get("steps", 0) + 1
