"""What `SAAP_VLLM` may say, checked when it is read."""

import os
from dataclasses import dataclass, fields
from numbers import Real

from saap.budget import Budget

VARIABLE = "SAAP_VLLM"


@dataclass(frozen=True)
class Options:
    """How much of the cache a decode step visits.

    `visited`: share of a request's pages, above 0 and at most 1; sinks and window count in.
    `sinks`, `window`: tokens at either end whose pages are always visited, even where that is
    more than the share. `dense_below`: contexts of at most so many tokens are visited whole.
    """

    visited: float = 0.1
    sinks: int = Budget.n_sink
    window: int = Budget.window
    dense_below: int = 2048

    def __post_init__(self):
        share = self.visited
        if not isinstance(share, Real) or not 0 < share <= 1:
            raise ValueError(f"visited must be above 0 and at most 1; got {share!r}")
        for name, least in (("sinks", 0), ("window", 1), ("dense_below", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or not least <= value < 2**31:
                raise ValueError(f"{name} must be an integer in {least}..2**31 - 1; got {value!r}")


def read_options() -> Options | None:
    """The options of this process; None where `SAAP_VLLM` is not set or is `0`.

    They are written `visited=0.1,window=256`, or `1` for the defaults.
    """
    text = os.environ.get(VARIABLE, "").strip()
    if text in ("", "0"):
        return None
    if text == "1":
        return Options()
    known = {field.name: type(field.default) for field in fields(Options)}
    values = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        name = name.strip()
        if name not in known:
            raise ValueError(f"{VARIABLE} must name some of {', '.join(known)}; got {part!r}")
        try:
            values[name] = known[name](value)
        except ValueError:
            raise ValueError(
                f"{name} in {VARIABLE} must be a number ({known[name].__name__}); got {value!r}"
            ) from None
    return Options(**values)


def required_options() -> Options:
    """The options, where the plug-in is at work. Raises ValueError where `SAAP_VLLM` is gone."""
    options = read_options()
    if options is None:
        raise ValueError(f"{VARIABLE} must stay as it was when vLLM started; got nothing")
    return options
