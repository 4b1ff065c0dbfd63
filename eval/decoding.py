"""Decode after a context with a method, through `saap.attached`: the path that users run."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from saap import hf
from saap.budget import Budget
from saap.hf.cache import SaapCache
from saap.methods import Method

from .variants import Point, Variant


@dataclass
class Visited:
    """Rows and bytes visited, summed over decode steps and layers of full attention."""

    rows: float = 0.0
    cached: float = 0.0
    nbytes: float = 0.0
    router_bytes: float = 0.0
    steps: int = 0

    @property
    def selectivity(self) -> float:
        return self.rows / self.cached if self.cached else 1.0

    def as_record(self) -> dict:
        """What every record of decoded tokens tells."""
        steps = max(1, self.steps)
        return {
            "selectivity": self.selectivity,
            "bytes_read": self.nbytes / steps,
            "router_bytes": self.router_bytes / steps,
        }


class Decoder:
    """Decodes one token at a time after a context that was read densely.

    Question and generated tokens both go through the method.
    """

    def __init__(self, model, context: hf.ReadContext, cache: SaapCache):
        self.model, self.context, self.cache = model, context, cache
        self.visited = Visited()

    def restart(self, budget: Budget) -> None:
        """Forget what was decoded, and go on under another budget of the same layout."""
        hf.rewind(self.cache, self.context)
        self.visited = Visited()
        for layer in self.cache.saap_layers:
            layer.store.budget = budget

    @torch.no_grad()
    def logits(self, tokens: list[int] | Tensor) -> Float[Tensor, "T vocab"]:
        """Logits after each of the tokens, float32."""
        found = []
        for token in torch.as_tensor(tokens).tolist():
            given = torch.tensor([[token]], device=self.model.device)
            found.append(self.model(given, **hf.over(self.cache)).logits[0, -1].float())
            self._count()
        return torch.stack(found)

    def greedy(
        self, tokens: list[int] | Tensor, n_tokens: int, stop: int | None = None
    ) -> list[int]:
        """The `n_tokens` tokens that follow `tokens`, or fewer if the last one is `stop`; the
        last one is not decoded."""
        generated: list[int] = []
        pending = tokens
        for _ in range(n_tokens):
            generated.append(int(self.logits(pending)[-1].argmax()))
            pending = generated[-1:]
            if pending == [stop]:
                break
        return generated

    @torch.no_grad()
    def take(self, tokens: list[int]) -> None:
        """Tokens that come after exact attention, not the method's; they do not count."""
        before, self.cache.exact = self.cache.exact, True
        try:
            given = torch.tensor([tokens], device=self.model.device)
            self.model(given, **hf.over(self.cache))
        finally:
            self.cache.exact = before

    def _count(self) -> None:
        visited = self.visited
        for layer in self.cache.saap_layers:
            store = layer.store
            visited.rows += store.visited_rows
            visited.cached += store.length
            visited.nbytes += store.bytes_read
            visited.router_bytes += 0 if store.selector is None else store.selector.nbytes
            visited.steps += 1


def whole(budget: Budget) -> Budget:
    """Rows laid out as by `budget`, all of them visited."""
    return dataclasses.replace(budget, dense_below=2**31 - 1)


@contextmanager
def decoder(
    model, context: hf.ReadContext, method: Method, budget: Budget, spare: int
) -> Iterator[Decoder]:
    """A decoder with room for `spare` tokens after the context."""
    with hf.attached(model, method=method, budget=budget) as saap_model:
        cache = hf.cache_from(saap_model, context, context.length + spare)
        yield Decoder(model, context, cache)


def decoders(
    model, context: hf.ReadContext, variant: Variant, points: list[Point], spare: int
) -> Iterator[tuple[Point, Decoder]]:
    """A decoder for each point, over one cache wherever rows are laid out alike."""
    for _, alike in itertools.groupby(sorted(points, key=layout), layout):
        alike = list(alike)
        with decoder(model, context, variant.method, alike[0].budget, spare) as own:
            for point in alike:
                point.prepare(variant.method)
                own.restart(point.budget)
                yield point, own


def each_point(
    model, context: hf.ReadContext, asked: list[tuple[Variant, list[Point]]], spare: int,
    measure: Callable[[Variant, Point, Decoder], list[dict]],
) -> list[dict]:  # fmt: skip
    """Records of all points, those of a variant together; `method` and `budget` are added to what
    `measure` gives.

    Exact variants are measured first, so that others can be held against them, and once for all
    their budgets.
    """
    found: dict[int, list[dict]] = {}
    for n, (variant, points) in sorted(
        enumerate(asked), key=lambda a: not a[1][0].method.is_exact
    ):
        found[n], asked_once = [], variant.method.is_exact
        for point, own in decoders(
            model, context, variant, points[:1] if asked_once else points, spare
        ):
            measured = measure(variant, point, own)
            for alike in points if asked_once else [point]:
                place = {"method": variant.label, "budget": alike.label}
                found[n] += [{**place, **record} for record in measured]
    return [record for n in range(len(asked)) for record in found[n]]


def divergence(dense: Float[Tensor, "T vocab"], other: Float[Tensor, "T vocab"]) -> float:
    """KL divergence of next-token distributions from those of dense attention, in nats, the mean
    over T tokens; arguments are logits."""
    p, q = (t.double().log_softmax(-1) for t in (dense, other))
    return float((p.exp() * (p - q)).sum(-1).mean())


def layout(point: Point) -> tuple:
    """What of a point's budget lays out rows, as a key to sort by."""
    budget = point.budget
    return budget.n_sink, budget.window, budget.flush_every or 0
