"""How much of a head's attention is left for the middle, for the choice among coded rows."""

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from saap.index.coordinates import Coordinates
from saap.kernels.attention.api import PreparedRanges
from saap.kernels.codes import PreparedChoice
from saap.selector import LayerInfo, Ranges


class Beside:
    """What takes its part of a head's softmax beside the middle, in the terms of codes.

    `lse`: gives the log-sum-exp of the scores of queries `[n, Hq, D]` with sinks and tail.
    `local`: attention over these, where it is prepared.
    """

    def __init__(
        self,
        layer: LayerInfo,
        coordinates: Coordinates,
        lse: Callable[[Tensor], Tensor],
        local: PreparedRanges | None,
    ):
        self.layer, self.coordinates, self.lse, self.local = layer, coordinates, lse, local

    def __call__(self, q: Float[Tensor, "n Hq D"]) -> Float[Tensor, "n Hq"]:
        """`select_rows`'s `outside`: codes leave out what the mean key adds to all scores."""
        lse = self.layer.beside_middle(self.lse(q))
        return self.coordinates.less_mean(lse, q, self.layer.sm_scale)

    def with_choice(self, choice: PreparedChoice) -> Callable[[Tensor], Ranges]:
        """The choice among rows that are beside this, at once where the backend does it."""
        layer = self.layer
        if self.local is not None and layer.sinks is None and layer.softcap is None:
            rows = *self.local.rows, self.coordinates.mean
            own = choice.beside(*rows, layer.sm_scale)
            if own is not None:
                return lambda q: own(q.float())
        return lambda q: choice(q.float(), self(q))
