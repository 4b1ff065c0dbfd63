"""The interface of a method: one selector for each layer's store."""

from abc import ABC, abstractmethod
from typing import ClassVar

from saap.budget import BOUNDS, Budget, is_integer
from saap.selector import LayerInfo, Selector
from saap.trained_index import LayerIndex, TrainedIndex


class Method(ABC):
    """One way to choose rows. `name` is its key in `METHODS`.

    `index` may be None where `needs_index` is False. `bounds`: the bounds of a budget that its
    selectors can follow.
    """

    name: ClassVar[str]
    needs_index: ClassVar[bool] = True
    bounds: ClassVar[tuple[str, ...]] = ("nprobe", "max_tokens", "top_p")
    saves_itself: ClassVar[bool] = False
    """Whether a saved context holds all that its selectors learned, so that no index is needed."""
    is_exact: ClassVar[bool] = False
    """Whether everything is visited, whatever the budget."""

    def __init__(self, index: TrainedIndex | None = None, *, seed: int = 0):
        if self.needs_index and index is None:
            raise ValueError(
                f"method {self.name!r} needs a trained index (`saap train`, --index FILE); "
                "got none"
            )
        self.index, self.seed = index, seed

    @abstractmethod
    def selector(self, layer: LayerInfo) -> Selector:
        """A new selector, for the store of one layer."""

    def layer_index(self, layer: LayerInfo) -> LayerIndex:
        """What was trained for that layer. ValueError if nothing was: it has a sliding window."""
        found = self.index.layers[layer.number]
        if found is None:
            raise ValueError(
                f"layer {layer.number} must have full attention to be searched; got one with a "
                "sliding window, for which the index holds nothing"
            )
        return found

    def check_budget(self, budget: Budget) -> None:
        """Raise ValueError for a bound that this method cannot follow, by name."""
        for bound in BOUNDS:
            value = getattr(budget, bound)
            if value is not None and bound not in self.bounds:
                raise ValueError(
                    f"method {self.name!r} follows {' and '.join(self.bounds)}; got "
                    f"{bound}={value}"
                )


def check_within(options: object, **limits: tuple[int, int]) -> None:
    """ValueError for a field that is no whole number within its limits, both included."""
    for name, (least, most) in limits.items():
        value = getattr(options, name)
        if not is_integer(value, least) or value > most:
            raise ValueError(f"{name} must be a whole number in {least}..{most}; got {value!r}")
