"""Random steps of `AsymmetricIVF`: whatever came before, it holds what it was given."""

import pytest
import torch

from saap.index.ivf import AsymmetricIVF

from .hostile import cases, damaged, torch_seed

pytestmark = pytest.mark.bad_input
N_KV, DIM, NLIST = 2, 16, 6


class Twin:
    """An index, and the keys `[Hkv, D]` that it has to hold, by position."""

    def __init__(self, own, path):
        self.own, self.generator, self.path = own, torch_seed(own), path
        self.spill = own.random() < 0.3
        centroids = torch.randn(N_KV, NLIST, DIM, generator=self.generator)
        if own.random() < 0.2:
            centroids[:, 1:] = centroids[:, :1]  # all keys fall into one bucket
        self.index = AsymmetricIVF.from_trained(
            torch.nn.functional.normalize(centroids, dim=-1),
            spill=self.spill,
            flush_every=own.choice((1, 3, 64)),
        )
        self.held: dict[int, torch.Tensor] = {}

    def keys(self, n):
        keys = torch.randn(N_KV, n, DIM, generator=self.generator)
        if self.own.random() < 0.2:
            keys = keys[:, :1].expand_as(keys)
        return keys * self.own.choice((1.0, 1.0, 0.0, 1e-20, 1e10))

    def add(self):
        n = self.own.choice((1, 1, 2, 30, 100))
        keys, places = self.keys(n), None
        first = max(self.held, default=-1) + 1
        if self.own.random() < 0.4:
            at = self.own.randrange(50)
            free = [p for p in range(first + 2 * n + at) if p not in self.held]
            places = torch.tensor(self.own.sample(free, n), dtype=torch.int64)
        self.index.add(keys, places)
        for i, place in enumerate(range(first, first + n) if places is None else places.tolist()):
            self.held[place] = keys[:, i]

    def remove(self):
        gone = self.own.sample(sorted(self.held), min(len(self.held), self.own.randrange(20)))
        asked = [*gone, 10**6, -5]
        assert self.index.remove(torch.tensor(asked)) == len(gone)
        for place in gone:
            del self.held[place]

    def truncate(self):
        length = self.own.randrange(max(self.held, default=0) + 3)
        gone = [place for place in self.held if place >= length]
        assert self.index.truncate(length) == len(gone)
        for place in gone:
            del self.held[place]

    def flush(self):
        self.index.flush()
        assert self.index.n_pending == 0

    def reopen(self):
        self.index.save(self.path)
        self.index = AsymmetricIVF.load(self.path)

    def wrong(self):
        """Refused, and nothing has changed."""
        nan = self.keys(2)
        nan[0, 1, 3] = self.own.choice((torch.nan, torch.inf))
        first = next(iter(self.held), 0)
        calls = (
            lambda: self.index.add(nan),
            lambda: self.index.add(self.keys(3)[:, :, :-1]),
            lambda: self.index.add(self.keys(2).double()),
            lambda: self.index.add(self.keys(2), torch.tensor([10**5, 10**5])),
            lambda: self.index.add(self.keys(2), torch.tensor([-1, 10**5])),
            lambda: self.index.add(self.keys(2), torch.tensor([1.0, 2.0])),
            lambda: self.index.add(self.keys(2), torch.tensor([10**5])),
            lambda: self.index.remove(torch.tensor([0.5])),
            lambda: self.index.truncate(-1),
            lambda: self.index.select(self.queries(), nprobe=0),
            lambda: self.index.select(self.queries()),
            lambda: self.index.select(self.queries(), nprobe=2, share="other"),
            lambda: self.index.search(self.queries(), 0, 1),
            lambda: self.index.search(self.queries(), 3, NLIST + 1),
            lambda: self.index.search(self.queries()[:, :3], 3, 2),
            *([lambda: self.index.add(self.keys(1), torch.tensor([first]))] if self.held else []),
        )
        with pytest.raises(ValueError, match=r"got|must"):
            self.own.choice(calls)()

    def queries(self):
        return torch.randn(self.own.choice((1, 3)), 4, DIM, generator=self.generator)

    def check(self):
        index = self.index
        assert index.ntotal == len(self.held)
        for head in range(N_KV):
            assert sorted(index.positions[head].tolist()) == sorted(self.held)
            for key, place in zip(
                index.vectors[head], index.positions[head].tolist(), strict=True
            ):
                assert torch.equal(key, self.held[place][head])
        q, share = self.queries(), self.own.choice(("group", "head"))
        if self.own.random() < 0.5:
            bound = {"nprobe": self.own.randrange(1, NLIST + 1)}
        else:
            bound = {"max_tokens": self.own.choice((0, 1, 7, 50, 10**6))}
        starts, lengths = index.select(q, **bound, share=share)
        most = bound.get("max_tokens", index.ntotal)
        whole = most >= index.ntotal if "max_tokens" in bound else bound["nprobe"] == NLIST
        for own_starts, own_lengths in zip(
            starts.flatten(0, 1).tolist(), lengths.flatten(0, 1).tolist(), strict=True
        ):
            rows = [
                r for s, n in zip(own_starts, own_lengths, strict=True) for r in range(s, s + n)
            ]
            assert len(rows) == len(set(rows))
            assert all(0 <= row < index.ntotal for row in rows)
            assert len(rows) <= most + index.n_pending
            assert len(rows) == index.ntotal or not whole

    def search(self):
        """All buckets: the true best keys."""
        q, k = self.queries(), self.own.choice((1, 5, 300))
        scores, places = self.index.search(q, k, NLIST)
        for i in range(len(q)):
            for h in range(q.shape[1]):
                found = [p for p in places[i, h].tolist() if p >= 0]
                assert len(found) == len(set(found)) == min(k, len(self.held))
                if not found:
                    continue
                keys = torch.stack([self.held[p][h // 2] for p in self.held])
                true = (keys @ q[i, h]).sort(descending=True).values[: len(found)]
                got = scores[i, h, : len(found)]
                # Sums of large products may be small, and round as the products do.
                allowed = 1e-5 * (1 + q[i, h].norm() * keys.norm(dim=1).max())
                assert (got - true).abs().max() <= allowed
                own = torch.stack([self.held[p][h // 2] for p in found]) @ q[i, h]
                assert (own - got).abs().max() <= allowed


def test_steps_of_an_index(tmp_path):
    steps = ("add", "add", "add", "remove", "truncate", "flush", "reopen", "wrong", "search")
    for own, counts in cases("index", 12):
        twin = Twin(own, tmp_path / "index.st")
        for _ in range(own.randrange(1, 12)):
            step = own.choice(steps)
            getattr(twin, step)()
            twin.check()
            counts["steps"] = counts.get("steps", 0) + 1


def test_damaged_files_of_an_index(tmp_path):
    """Refused by one line that names the file, or it is the index that was saved."""
    path = tmp_path / "index.st"
    for own, counts in cases("index files", 60):
        if not path.exists() or own.random() < 0.02:
            twin = Twin(own, path)
            twin.add(), twin.add(), twin.reopen()
            good, held = path.read_bytes(), twin.held
        bad = damaged(own, good)
        (tmp_path / "bad.st").write_bytes(bad)
        try:
            index = AsymmetricIVF.load(tmp_path / "bad.st")
        except ValueError as error:
            assert "bad.st" in str(error)
            assert "\n" not in str(error)
            counts["refused"] = counts.get("refused", 0) + 1
            continue
        assert bad == good or index.ntotal == len(held)
