"""How much of the cache a decode step may visit, and where the cache stays dense."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Real

LEAST_FLUSH, FLUSHES = 8, 256
MOST = 2**31 - 1  # rows are numbered by int32
BOUNDS = ("nprobe", "max_tokens", "top_p", "min_weight")


@dataclass(frozen=True)
class Budget:
    """What one decode step visits of each layer; validated when made.

    The first `n_sink` and the last `window` tokens are always visited. All between them is the
    middle. Its rows, or for methods with buckets its buckets, are visited in the order of their
    scores. Four bounds say where that ends: after `nprobe` buckets; after `max_tokens` rows (the
    last bucket is cut to its newest rows); when the visited buckets hold the share `top_p` of the
    predicted attention of the middle; or before keys whose predicted attention weight is below
    `min_weight` (added over the query heads that share a selection). Give at least one; of
    several, the one that is reached first ends the selection.

    With `max_tokens` each head, layer and token costs the same. `min_weight` spends rows where
    attention is: nothing on heads that look at the sinks, much on tokens that ask for something
    far back. It has less error for the same mean number of rows (docs/routing.md).
    `layer_importance`: a number for each layer of the model, by which the weights of its rows are
    multiplied before they are compared with `min_weight` (`saap advise --by-weight` measures
    them); None: all layers alike.

    `share`: "group" makes one selection for the query heads of a KV head; "head" makes one for
    each query head.
    `flush_every`: tokens that leave the window join the indexed rows this many at a time, so a
    step visits up to `flush_every - 1` tokens more than the window; None, the default, takes 8,
    and more for long contexts (1/256 of their length), where a flush moves more rows.
    `estimate_rest`: what the rows that are not visited would add is estimated from how keys and
    values are spread (docs/routing.md), by methods that visit the best rows one by one.
    `dense_layers`: numbers of layers that visit everything. `dense_below`: contexts of at most
    this many tokens are visited whole, because choosing costs more than it saves.
    """

    nprobe: int | None = None
    max_tokens: int | None = None
    n_sink: int = 16
    window: int = 16
    share: str = "group"
    top_p: float | None = None
    min_weight: float | None = None
    layer_importance: Sequence[float | int] | None = None
    flush_every: int | None = None
    dense_layers: tuple[int, ...] = ()
    dense_below: int = 0
    estimate_rest: bool = True

    def __post_init__(self):
        if all(getattr(self, name) is None for name in BOUNDS):
            raise ValueError(f"one of {', '.join(BOUNDS)} must be set; got none of them")
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
                raise ValueError(f"{name} must be an integer of at least {least}; got {value!r}")
            if value is not None and value > MOST:
                raise ValueError(f"{name} must be an integer below 2 ** 31; got {value}")
        if self.top_p is not None and not (isinstance(self.top_p, Real) and 0 < self.top_p <= 1):
            raise ValueError(f"top_p must be above 0 and at most 1; got {self.top_p!r}")
        if self.min_weight is not None and not (
            isinstance(self.min_weight, Real) and 0 < self.min_weight < math.inf
        ):
            raise ValueError(f"min_weight must be a number above 0; got {self.min_weight!r}")
        if not isinstance(self.estimate_rest, bool):
            raise ValueError(f"estimate_rest must be true or false; got {self.estimate_rest!r}")
        self._check_importance()
        if self.share not in ("group", "head"):
            raise ValueError(f"share must be 'group' or 'head'; got {self.share!r}")
        if isinstance(self.dense_layers, str) or not all(
            is_integer(layer, 0) for layer in self.dense_layers
        ):
            raise ValueError(
                f"dense_layers must be a tuple of layer numbers from 0; got {self.dense_layers!r}"
            )
        object.__setattr__(self, "dense_layers", tuple(self.dense_layers))

    def _check_importance(self) -> None:
        given = self.layer_importance
        if given is None:
            return
        numbers = not isinstance(given, str) and isinstance(given, Iterable)
        if not numbers or not all(isinstance(x, Real) and 0 < x < math.inf for x in given):
            raise ValueError(
                f"layer_importance must be numbers above 0, one for each layer; got {given!r}"
            )
        if self.min_weight is None:
            raise ValueError("layer_importance must be None without min_weight; got some")
        object.__setattr__(self, "layer_importance", tuple(float(x) for x in given))

    def least_weight(self, layer: int) -> float | None:
        """`min_weight` of that layer, its importance taken into account."""
        if self.layer_importance is None:
            return self.min_weight
        return self.min_weight / self.layer_importance[layer]

    def rows_in_lists(self, length: int) -> int:
        """How many rows of a sequence of `length` tokens are indexed: neither sinks nor tail.

        It depends on the length alone and never falls as a sequence grows. So rows lie in the same
        places, whether tokens came one by one or all at once.
        """
        spare = max(0, length - self.n_sink - self.window)
        every = self.flush_every
        if every is None:
            # A power of two that doubles where `spare` is a multiple of it, before and after.
            every = max(LEAST_FLUSH, 2 ** ((spare // FLUSHES).bit_length() - 1))
        return spare - spare % every

    @classmethod
    def default(cls) -> "Budget":
        """A fixed number of rows, so a token costs the same at any long context: 3 % of 128k
        tokens.

        Below 16k tokens choosing costs about as much as reading everything (`benchmarks/decode`),
        so shorter contexts are visited whole.
        """
        return cls(max_tokens=4096, dense_below=16384)

    @classmethod
    def for_selectivity(
        cls,
        selectivity: float,
        context: int,
        *,
        n_sink: int = n_sink,
        window: int = window,
        share: str = "group",
        estimate_rest: bool = True,
    ) -> "Budget":
        """The budget that visits `selectivity * context` rows, sinks and tail counted in.

        The tail is the window and what has left it but is not indexed yet, at a context of this
        length. Raises ValueError when sinks and tail alone are more than that.
        """
        if not 0.0 < selectivity <= 1.0:
            raise ValueError(f"selectivity must be above 0 and at most 1; got {selectivity}")
        rows = round(selectivity * context)
        places = {
            "n_sink": n_sink, "window": window, "share": share, "estimate_rest": estimate_rest,
        }  # fmt: skip
        always = context - cls(max_tokens=0, **places).rows_in_lists(context)
        if always >= context:
            raise ValueError(
                f"window must leave rows to choose of a context of {context}, of which the first "
                f"{n_sink} are visited, too; got {window}"
            )
        if rows <= always:
            raise ValueError(
                f"selectivity must be above {always / context:.4f}, because sinks and window take "
                f"{always} rows of {context}; got {selectivity}"
            )
        return cls(max_tokens=rows - always, **places)


def is_integer(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
