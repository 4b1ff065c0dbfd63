"""How much of the cache a decode step may visit."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Budget:
    """What one decode step visits of each layer; validated when made.

    `n_sink` first and `window` last tokens are always visited; of the middle, `nprobe` buckets, or
    buckets until `max_tokens` rows (the last one cut to its newest rows), or whichever comes
    first. `share`: "group" makes one selection for the query heads of a KV head;
    "head" one a query head.
    """

    nprobe: int | None = None
    max_tokens: int | None = None
    n_sink: int = 16
    window: int = 256
    share: str = "group"

    def __post_init__(self):
        if self.nprobe is None and self.max_tokens is None:
            raise ValueError(
                "nprobe and max_tokens are both None: one of them bounds the selection"
            )
        for name, least in (("nprobe", 1), ("max_tokens", 0), ("n_sink", 0), ("window", 1)):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < least):
                raise ValueError(f"{name}={value!r}: accepted are integers from {least}")
        if self.share not in ("group", "head"):
            raise ValueError(f"share={self.share!r}: accepted are 'group' and 'head'")

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
