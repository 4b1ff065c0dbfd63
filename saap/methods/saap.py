"""Saap: the rows whose keys, coded in some bits a dimension, have the largest predicted weights.

A vector search in two stages over codes that nothing but two covariance matrices were learned for:
a coarse code of every key, a fine one of the candidates (`saap.kernels.codes`), in coordinates
that keys and queries share (`saap.index.coordinates`), with a scale for each key that makes its
inner product right in the mean, as in RaBitQ (Gao and Long, arXiv 2405.12497). ParisKV (arXiv
2602.07721) codes without learning, PQCache (arXiv 2407.12820) with codebooks of the prompt's keys.
A KV group adds its heads' attention weights: their softmax over the candidates, sinks and tail.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from saap.index.coordinates import Coordinates, balanced
from saap.index.moments import AT_ONCE, MOST_OBSERVED, Moments, RecentQueries, Sums, Toward
from saap.kernels.codes import (
    Codes,
    PreparedChoice,
    QueryMap,
    candidates_of,
    coordinates_for,
    encode_rows,
)
from saap.kernels.rest import Scored
from saap.selector import LayerInfo, Middle, Query, RangeBuffer, Ranges, Selector

from .base import Method, check_within
from .beside import Beside

GROWTH = 1.5
"""Coordinates are learned again when the rows are so many times those that they came from."""

SPARE, MOST_SPARE = 256, 1 << 16  # rows: room for codes that are still to come
MOST_CANDIDATES = 2**31 - 1
CODED_AT_ONCE = 2048  # rows: what coding holds of them stays in the cache


def as_coded(coordinates: Coordinates) -> Coordinates:
    """As many as codes have."""
    return coordinates.padded(coordinates_for(coordinates.mean.shape[-1]))


@dataclass(frozen=True)
class SaapSearch:
    """How many rows each query head lets through its coarse codes to the whole ones.

    `width` times the rows of the budget, but not more than `margin` beyond it: rows near its edge
    have little weight. And at least `least`, and one of `one_of` rows: the longer a context, the
    more of its rows come before a needle by chance. `width` None: every row, which reads most.
    Each head has candidates of its own, for what a coarse score errs by is a share of how far a
    head's scores are apart: chosen together, a peaked head's rows lose to those of flat ones, and
    with them what a rare query asks for (docs/routing.md).
    """

    width: float | None = 2.0
    least: int = 1024
    margin: int = 1024
    one_of: int = 8

    def __post_init__(self):
        if self.width is not None and not 1 <= self.width <= 1e6:
            raise ValueError(f"width must be None or in 1..1e6; got {self.width}")
        most = 2**31
        check_within(self, least=(0, most), margin=(0, most), one_of=(1, most))

    def of_any_context(self, max_tokens: int) -> int:
        """Rows that a head lets through, however many there are."""
        if self.width is None:
            return MOST_CANDIDATES
        return max(self.least, min(round(self.width * max_tokens), max_tokens + self.margin))

    def candidates(self, max_tokens: int, n_rows: int) -> int:
        """Rows of `n_rows` that a head lets through."""
        wanted = candidates_of(n_rows, self.of_any_context(max_tokens), self.one_of)
        return min(n_rows, wanted)


class SaapSelector(Selector):
    """Codes of the rows of the middle, in time order, coded once when they join it."""

    bounds = ("max_tokens", "min_weight")
    reads_derope = False
    visits_best = True

    least_rows = 512  # to learn coordinates from

    def __init__(self, layer: LayerInfo, method: "Saap", coordinates: Coordinates | None):
        self.layer, self.method = layer, method
        self.trained = coordinates = None if coordinates is None else as_coded(coordinates)
        self.learned: dict[int, Coordinates] = {}  # by sequence
        self.learned_from: dict[int, int] = {}  # rows
        self.recent: dict[int, RecentQueries] = {}
        self.observed: dict[int, list[Tensor]] = {}
        self.coordinates = coordinates
        self.codes: Codes | None = None
        self.n_coded: list[int] = []
        self.scored: Tensor | None = None  # whole codes that the latest step read
        self._choice: PreparedChoice | None = None
        self._asked = False  # whether it took into account what sinks and tail hold
        self._mapped: tuple[Coordinates, QueryMap] | None = None
        self.n_scanned = 0.0  # rows whose coarse codes it read, for each sequence and KV head
        if coordinates is not None:
            self.least_rows = 0

    def check_budget(self, budget):
        super().check_budget(budget)
        if budget.max_tokens is None:
            raise ValueError(
                "method 'saap' needs max_tokens, the most rows of a step, beside min_weight; got "
                f"min_weight={budget.min_weight} alone"
            )

    @property
    def nbytes(self) -> int:
        """Bytes per sequence: codes as the latest step read them, and the map of queries."""
        if self.scored is None:
            return 0
        n_kv, rows = self.codes.scale.shape[1], self.n_scanned
        whole = int(self.scored.sum()) / len(self.scored)  # waits for a GPU, a step does not
        read = n_kv * rows * self.codes.coarse_bytes + whole * self.codes.fine_bytes
        return round(self.query_map.nbytes + read)

    @property
    def waits(self) -> bool:
        return self.trained is None and (self.coordinates is None or bool(self.observed))

    def observe(self, q_rope, n_new):
        if self.trained is not None:
            return
        for b, n in enumerate(n_new):
            if not n:
                continue
            new = q_rope[b]
            if b in self.learned:
                self.recent[b].add(new if new.shape[1] == n else new[:, -n:])
                continue
            new = new[:, -min(n, MOST_OBSERVED) :]
            new = new.float().clone(memory_format=torch.contiguous_format)
            own = self.observed.setdefault(b, [])
            own.append(new)
            held = sum(t.shape[1] for t in own)
            while held - own[0].shape[1] >= MOST_OBSERVED:
                held -= own.pop(0).shape[1]

    def select_sequences(self, chosen):
        self.n_coded = []
        chosen = chosen.tolist()
        for held in ("learned", "learned_from", "observed"):
            own = getattr(self, held)
            setattr(self, held, {i: own[b] for i, b in enumerate(chosen) if b in own})
        self.recent = {i: self.recent[b].copy() for i, b in enumerate(chosen) if b in self.recent}
        if self.learned:
            self._put_together(len(chosen))

    def forget(self, sequence):
        for held in (self.learned, self.learned_from, self.recent, self.observed):
            held.pop(sequence, None)
        if self.trained is None and not self.learned:
            self.coordinates = self.scored = None

    def update(self, middle: Middle) -> None:
        """Code the rows that are new; after sequences changed places, all of them."""
        if self.trained is None:
            self._learn(middle)
        before = [*self.n_coded, *[0] * len(middle.n_rows)]
        self._reserve(middle)
        codes = self.codes
        for b, n in enumerate(middle.n_rows):
            own = self.coordinates.of_sequence(b)
            for first in range(before[b], n, CODED_AT_ONCE):
                rows = slice(first, min(first + CODED_AT_ONCE, n))
                keys = middle.keys_of(b, rows.start, rows.stop)[None]
                encode_rows(own.keys(keys)[0], own.importance[0], codes, b, first)
        self.n_coded = list(middle.n_rows)

    def _learn(self, middle: Middle) -> None:
        """Coordinates of each prompt's own queries and keys, once it has enough of them.

        Again whenever it has grown by half: RoPE turns later keys and queries in directions in
        which those before hardly varied (`benchmarks/drift.py`).
        """
        again = False
        for b, n in enumerate(middle.n_rows):
            if not n:
                continue
            if b in self.learned_from:  # rows that they came from may have been truncated
                self.learned_from[b] = min(self.learned_from[b], n)
            if n < GROWTH * self.learned_from.get(b, 0):
                continue
            self._learn_from(
                b,
                n,
                functools.partial(self.sums_of_keys, middle, b),
                functools.partial(middle.keys_of, b, max(0, n - MOST_OBSERVED), n),
            )
            if b < len(self.n_coded):
                self.n_coded[b] = 0
            again = True
        if again or self.coordinates is None:
            self._put_together(len(middle.n_rows))

    def _learn_from(
        self,
        b: int,
        n: int,
        sums_of_keys: Callable[[Toward | None], Sums],
        latest_keys: Callable[[], Tensor] | None,
    ) -> None:
        """Coordinates of a sequence of n keys; `latest_keys` stand in for queries, if given."""
        every = sums_of_keys(None)
        if b not in self.learned:
            recent = self.recent.setdefault(b, RecentQueries(len(every.count)))
            if b in self.observed:
                recent.begin(torch.cat(self.observed.pop(b), 1))
            elif recent.sums is None:  # where tokens came with no queries
                recent.begin(latest_keys())
        queries = self.recent[b].sums
        keys = sums_of_keys(Toward.of(queries, every))
        self.learned[b] = as_coded(balanced(Moments.of_sums(queries, keys)))
        self.learned_from[b] = n

    @staticmethod
    def sums_of_keys(middle: Middle, b: int, toward: Toward | None) -> Sums:
        sums = Sums.zeros(middle.n_kv, middle.dim, middle.device)
        for keys in middle.parts_of(b, AT_ONCE):
            sums += Sums.of(keys, toward)
        return sums

    def _put_together(self, batch: int) -> None:
        known = next(iter(self.learned.values()))
        self.coordinates = Coordinates.stacked([self.learned.get(b, known) for b in range(batch)])

    def state(self):
        codes, n = self.codes, max(self.n_coded)
        coded = {
            "coarse": codes.coarse[..., :n].contiguous(),
            "fine": codes.fine[:, :, :n].contiguous(),
            "scale": codes.scale[..., :n].contiguous(),
        }
        kept = {}
        if self.trained is None:
            batch = len(self.n_coded)
            n_kv, _, dim = self.coordinates.of_queries.shape[1:]
            rows = [min(self.learned_from.get(b, 0), self.n_coded[b]) for b in range(batch)]
            kept = {
                **self.state_before(batch, n_kv, dim),
                "learned_from": torch.tensor(rows, dtype=torch.int32),
            }
        return coded | self.coordinates.tensors() | kept

    def state_before(self, batch, n_kv, dim):
        if self.trained is not None:
            return {}
        none = Sums.zeros(n_kv, dim, torch.device(self.layer.device))
        sums = [self._queries_of(b, n_kv) or none for b in range(batch)]
        return {
            "query_products": torch.stack([own.products for own in sums]),
            "query_sum": torch.stack([own.total for own in sums]),
            "n_queries": torch.stack([own.count for own in sums]),
        }

    def _queries_of(self, b: int, n_kv: int) -> Sums | None:
        """Sums over those that a sequence was learned from, or will be."""
        recent = self.recent.get(b)
        if b not in self.observed:
            return None if recent is None else recent.sums
        recent = RecentQueries(n_kv, None if recent is None else recent.sums)
        recent.begin(torch.cat(self.observed[b], 1))
        return recent.sums

    def restore_before(self, state, batch, n_kv, dim):
        if self.trained is None and state:
            check_tensors(state, of_queries(batch, n_kv, dim))
            self._restore_queries(state, batch)

    def restore(self, state, middle):
        batch, n_kv, dim = len(middle.n_rows), middle.n_kv, middle.dim
        n, coordinates = max(middle.n_rows), coordinates_for(dim)
        maps = 1 if self.trained is not None else batch
        expected = {
            **Codes.shapes(batch, n_kv, coordinates, n),
            "of_keys": ((maps, n_kv, coordinates, dim), torch.float32),
            "of_queries": ((maps, n_kv, coordinates, dim), torch.float32),
            "mean": ((maps, n_kv, dim), torch.float32),
            "importance": ((maps, n_kv, coordinates), torch.float32),
        }
        if self.trained is None:
            expected |= of_queries(batch, n_kv, dim)
            expected["learned_from"] = (batch,), torch.int32
        check_tensors(state, expected)
        parts = ("of_keys", "of_queries", "mean", "importance")
        self.coordinates = Coordinates(**{name: state[name] for name in parts})
        if self.trained is None:
            self._restore_learned(state, middle)
        self.codes = Codes(state["coarse"], state["fine"], state["scale"])
        self.n_coded = list(middle.n_rows)

    def _restore_learned(self, state: dict[str, Tensor], middle: Middle) -> None:
        counts = state["n_queries"]
        for b, rows in enumerate(state["learned_from"].tolist()):
            if not 0 <= rows <= middle.n_rows[b]:
                raise ValueError(
                    f"learned_from of the codes must be in 0..{middle.n_rows[b]}; got {rows}"
                )
            if not rows:  # too short to have learned anything
                continue
            if not (counts[b] > 0).all():
                least = float(counts[b].min())
                raise ValueError(f"n_queries of the codes must be above 0; got {least}")
            self.learned[b], self.learned_from[b] = self.coordinates.of_sequence(b), rows
        self._restore_queries(state, len(middle.n_rows))

    def _restore_queries(self, state: dict[str, Tensor], batch: int) -> None:
        for b in range(batch):
            sums = Sums(*(state[name][b] for name in ("n_queries", "query_sum", "query_products")))
            if (sums.count > 0).all():
                self.recent[b] = RecentQueries(len(sums.count), sums)

    def _reserve(self, middle: Middle) -> None:
        batch, n = len(middle.n_rows), max(middle.n_rows)
        codes = self.codes
        if codes is not None and codes.n >= n and len(codes.scale) == batch:
            return
        room = n + min(n // 8, MOST_SPARE) + SPARE
        self.codes = Codes.empty(batch, middle.n_kv, middle.dim, room, middle.device)
        if codes is not None and len(codes.scale) == batch:
            kept = min(codes.n, n)
            self.codes.coarse[..., :kept] = codes.coarse[..., :kept]
            self.codes.fine[:, :, :kept] = codes.fine[:, :, :kept]
            self.codes.scale[..., :kept] = codes.scale[..., :kept]

    def select(self, query: Query, middle: Middle, budget, room: RangeBuffer):
        q = query.q_rope.float()
        heads = middle.n_kv if budget.share == "group" else q.shape[1]
        n = max(middle.n_rows)
        most = min(budget.max_tokens, n)
        if self.scored is None or self.scored.shape != (len(q), heads):
            self.scored = torch.empty(len(q), heads, dtype=torch.int64, device=q.device)
        self.left_out = self._left_out(q, budget)
        layer, beside = self.layer, None
        asks = heads < q.shape[1] or budget.min_weight is not None
        if asks and query.local_lse is not None:
            about = layer.sm_scale, layer.softcap
            local = None if query.local is None else query.local(*about)
            beside = Beside(layer, self.coordinates, lambda _: query.local_lse(*about), local)
        self._asked = beside is not None
        ranges = self.choose_rows(
            q,
            beside,
            self.codes,
            middle.n_rows,
            max_tokens=budget.max_tokens,
            n_candidates=self.method.search_options.of_any_context(budget.max_tokens),
            one_of=self.method.search_options.one_of,
            query_map=self.query_map,
            min_weight=budget.least_weight(self.layer.number),
            share=budget.share,
            first_row=middle.first_row,
            out=room.take(len(q), heads, most, q.device),
            scored=self.scored,
            left_out=None if self.left_out is None else self.left_out.lse,
            impl=query.impl,
        )
        every = most == n and budget.min_weight is None
        self.n_scanned = 0.0 if every else sum(middle.n_rows) / len(middle.n_rows)
        return ranges

    def _left_out(self, q: Tensor, budget) -> Scored | None:
        """What the choice will write to, the same objects from step to step."""
        if not budget.estimate_rest:
            return None
        mean, search, held = self.coordinates.mean, self.method.search_options, self.left_out
        n_best = search.of_any_context(budget.max_tokens)
        if (
            held is not None and held.lse.shape == q.shape[:2] and held.mean is mean
            and held.n_scored is self.scored and held.n_best == n_best
        ):  # fmt: skip
            return held
        lse = torch.empty(q.shape[:2], device=q.device, dtype=torch.float32)
        return Scored(lse, mean, self.scored, n_best, search.one_of)

    def again(self, local):
        choice = self._choice
        if not self._asked:
            return lambda q: choice(q.float())
        if local is None:
            return None
        beside = Beside(self.layer, self.coordinates, lambda q: local(q)[1], local)
        return beside.with_choice(choice)

    @property
    def query_map(self) -> QueryMap:
        """Of queries to coordinates whose products are attention's scores."""
        own = self.coordinates
        if self._mapped is None or self._mapped[0] is not own:
            matrix = own.of_queries * self.layer.sm_scale
            self._mapped = own, QueryMap.of(matrix, own.moments_of_queries())
        return self._mapped[1]

    def choose_rows(
        self,
        q: Tensor,
        beside: Beside | None,
        codes: Codes,
        n_rows: list[int],
        **options,
    ) -> Ranges:
        """`select_rows`, whose arguments but for the first two are those of the step before."""
        if self._choice is None or not self._choice.fits(q, codes, n_rows, **options):
            self._choice = PreparedChoice(q, codes, n_rows, **options)
        choose = self._choice if beside is None else beside.with_choice(self._choice)
        return choose(q)


def of_queries(batch: int, n_kv: int, dim: int) -> dict[str, tuple]:
    """Shapes and dtypes of what is saved of queries."""
    return {
        "query_products": ((batch, n_kv, dim, dim), torch.float64),
        "query_sum": ((batch, n_kv, dim), torch.float64),
        "n_queries": ((batch, n_kv), torch.float64),
    }


def check_tensors(state: dict[str, Tensor], expected: dict[str, tuple]) -> None:
    """ValueError for saved tensors that are not as expected."""
    for name, (shape, dtype) in expected.items():
        own = state.get(name)
        if own is None or own.shape != shape or own.dtype != dtype:
            found = None if own is None else (tuple(own.shape), own.dtype)
            raise ValueError(f"{name} of the codes must be {shape}, {dtype}; got {found}")
        if own.is_floating_point() and not own.isfinite().all():
            raise ValueError(f"{name} of the codes must be finite; got NaN or inf")


class Saap(Method):
    """`search.width`: candidates per row of the budget; `search.one_of`: rows per candidate, at
    most. Without an index that holds coordinates they are learned from the prompt's own queries
    and keys."""

    name = "saap"
    needs_index = False
    saves_itself = True
    bounds = ("max_tokens", "min_weight")

    def __init__(self, index=None, *, seed=0, search: SaapSearch | None = None):
        super().__init__(index, seed=seed)
        self.search_options = search or SaapSearch()

    def selector(self, layer):
        own = None if self.index is None else self.layer_index(layer).coordinates
        return SaapSelector(layer, self, own)
