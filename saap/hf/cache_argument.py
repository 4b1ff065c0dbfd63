"""What a model's cache is called: `cache`, and before transformers 5.24 `past_key_values`."""

import inspect
from collections.abc import Mapping

from transformers import Cache, GenerationMixin

NAMES = ("cache", "past_key_values")
"""Both may come: newer versions take the old name, too, and models of other sources may use it."""

_takes = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
NAME = next(name for name in NAMES if name in _takes)


def over(cache: Cache) -> dict[str, Cache]:
    """The keyword that hands a cache to a model or its `generate()`, in any version.

    model.generate(**inputs, **saap.hf.over(cache))
    """
    return {NAME: cache}


def given(keywords: Mapping[str, object]) -> Cache | None:
    """The cache among the keywords of a call."""
    return next((keywords[name] for name in NAMES if keywords.get(name) is not None), None)
