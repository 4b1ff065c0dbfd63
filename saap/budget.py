"""How much of the cache a decode step may visit, and where the cache stays dense."""

import math
from dataclasses import dataclass
from numbers import Real

BOUNDS = ("nprobe", "max_tokens", "top_p", "min_weight")


@dataclass(frozen=True)
class Budget:
    """What one decode step visits of each layer; validated when made.

    The first `n_sink` and the last `window` tokens are always visited. Of the middle, buckets are
    visited in the order of their scores until `nprobe` of them, or `max_tokens` rows (the last
    bucket cut to its newest rows), or the share `top_p` of the mass that the router predicts, or
    until no key of the next is predicted an attention weight of `min_weight` (added over the query
    heads that share a selection): whichever comes first of those that are given, at least one.

    `max_tokens` costs each head, layer and token the same. `min_weight` spends rows where
    attention is: nothing on heads that look at the sinks, much on tokens that ask for something
    far back; less error for the same mean (docs/routing.md).

    `share`: "group" makes one selection for the query heads of a KV head; "head" one a query head.
    `flush_every`: tokens that leave the window are put into buckets this many at a time.
    `dense_layers`: numbers of layers that visit everything. `dense_below`: contexts of at most so
    many tokens are visited whole, because choosing costs more than it saves.
    """

    nprobe: int | None = None
    max_tokens: int | None = None
    n_sink: int = 16
    window: int = 256
    share: str = "group"
    top_p: float | None = None
    min_weight: float | None = None
    flush_every: int = 512
    dense_layers: tuple[int, ...] = ()
    dense_below: int = 0

    def __post_init__(self):
        if all(getattr(self, name) is None for name in BOUNDS):
            raise ValueError(f"{', '.join(BOUNDS)} are all None: one of them bounds the selection")
        for name, least in (
            ("nprobe", 1),
            ("max_tokens", 0),
            ("n_sink", 0),
            ("window", 1),
            ("flush_every", 1),
            ("dense_below", 0),
        ):
            value = getattr(self, name)
            if value is not None and not is_integer(value, least):
                raise ValueError(f"{name}={value!r}: accepted are integers from {least}")
        if self.top_p is not None and not (isinstance(self.top_p, Real) and 0 < self.top_p <= 1):
            raise ValueError(f"top_p={self.top_p!r}: accepted are 0 < top_p <= 1")
        if self.min_weight is not None and not (
            isinstance(self.min_weight, Real) and 0 < self.min_weight < math.inf
        ):
            raise ValueError(f"min_weight={self.min_weight!r}: accepted are numbers above 0")
        if self.share not in ("group", "head"):
            raise ValueError(f"share={self.share!r}: accepted are 'group' and 'head'")
        if isinstance(self.dense_layers, str) or not all(
            is_integer(layer, 0) for layer in self.dense_layers
        ):
            raise ValueError(
                f"dense_layers={self.dense_layers!r}: accepted is a tuple of layer numbers from 0"
            )
        object.__setattr__(self, "dense_layers", tuple(self.dense_layers))

    @classmethod
    def default(cls) -> "Budget":
        """So many rows that a token costs the same at any long context: 3 % of 128k tokens.

        Below 16k tokens choosing costs about as much as reading everything (`benchmarks/decode`),
        so those contexts are visited whole.
        """
        return cls(max_tokens=4096, dense_below=16384)

    @classmethod
    def for_selectivity(
        cls, selectivity: float, context: int, *, n_sink: int, window: int, share: str = "group"
    ) -> "Budget":
        """The budget that visits `selectivity * context` rows, sinks and window counted in.

        Raises ValueError when sinks and window alone are more than that.
        """
        if not 0.0 < selectivity <= 1.0:
            raise ValueError(f"selectivity={selectivity}: accepted are 0 < selectivity <= 1")
        rows = round(selectivity * context)
        if rows <= n_sink + window:
            raise ValueError(
                f"selectivity={selectivity} of {context} tokens is {rows} rows, and sinks and "
                f"window take {n_sink + window}: accepted is "
                f"above {(n_sink + window) / context:.4f}"
            )
        return cls(max_tokens=rows - n_sink - window, n_sink=n_sink, window=window, share=share)


def is_integer(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def check_predicts_weights(predicts_weights: bool, budget: Budget) -> None:
    """ValueError when a budget asks for weights that a router does not predict."""
    if budget.min_weight is not None and not predicts_weights:
        raise ValueError(
            f"min_weight={budget.min_weight}: accepted with routers that predict attention "
            "weights, the trained network or cells"
        )
