"""The map of queries to the coordinates of codes, in 8 bits or 16: every step reads all of it."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

NARROW_ERROR = 0.02
"""Of a score's deviation: a map of 8 bits may err by it. Codes err by several times as much."""


@dataclass(frozen=True, eq=False)
class QueryMap:
    """A query `q [D]` of KV head h has the coordinates `(q @ weights[b, h]) * scale[b, h]`.

    `weights` int8 or int16 `[B, Hkv, D, P]`, `scale` float32 `[B, Hkv, P]`, of B sequences or of
    all (`B = 1`). Whole numbers with a scale for each coordinate rather than bfloat16: the large
    parts of a coordinate may cancel, and what is left would drown in what bfloat16 errs by.
    """

    weights: Int[Tensor, "B Hkv D P"]
    scale: Float[Tensor, "B Hkv P"]

    @classmethod
    def of(
        cls,
        matrix: Float[Tensor, "B Hkv P D"],
        moments: Float[Tensor, "B Hkv D D"] | None = None,
    ) -> "QueryMap":
        """The map `q -> matrix @ q`.

        moments: second moments of queries. With them weights are int8 where no KV head's scores
        err by more than `NARROW_ERROR` of their deviation, keys having coordinates of unit
        variance; where parts of a coordinate cancel they may.
        """
        if moments is not None:
            narrow = cls._rounded(matrix, torch.int8)
            if (narrow.error(matrix, moments) <= NARROW_ERROR).all():
                return narrow
        return cls._rounded(matrix, torch.int16)

    @classmethod
    def _rounded(cls, matrix: Float[Tensor, "B Hkv P D"], dtype: torch.dtype) -> "QueryMap":
        largest = matrix.abs().amax(-1)
        scale = torch.where(largest > 0, largest / torch.iinfo(dtype).max, 1.0).float()
        weights = (matrix / scale[..., None]).round().to(dtype)
        return cls(weights.mT.contiguous(), scale)

    def error(
        self, matrix: Float[Tensor, "B Hkv P D"], moments: Float[Tensor, "B Hkv D D"]
    ) -> Float[Tensor, "B Hkv"]:
        """The deviation of what scores err by, over that of the scores that `matrix` gives."""

        def variance(of: Tensor) -> Tensor:
            return (of @ moments * of).sum((-2, -1))

        own = (self.weights * self.scale[:, :, None]).mT
        return (variance(own - matrix) / variance(matrix)).sqrt()

    @property
    def nbytes(self) -> int:
        """Bytes that a step reads per sequence."""
        return self.weights[0].nbytes + self.scale[0].nbytes

    @property
    def strides(self) -> tuple[int, int]:
        """From a sequence's weights and scales to those of the next one; 0 where all share one."""
        several = len(self.weights) > 1
        return self.weights.stride(0) * several, self.scale.stride(0) * several

    @property
    def fault(self) -> str | None:
        """What is wrong with it, or None."""
        weights, scale = self.weights, self.scale
        fits = weights.ndim == 4 and scale.shape == (*weights.shape[:2], weights.shape[3])
        whole = weights.dtype in (torch.int8, torch.int16)
        if not (fits and whole and scale.dtype == torch.float32):
            return (
                "query_map must be int8 or int16 [B, Hkv, D, P] with float32 scales [B, Hkv, P]; "
                f"got {weights.dtype} {list(weights.shape)} and {scale.dtype} {list(scale.shape)}"
            )
        if not (weights.is_contiguous() and scale.is_contiguous()):
            return f"query_map must be contiguous; got strides {weights.stride()}"
        if weights.device != scale.device:
            return f"query_map must lie on one device; got {weights.device} and {scale.device}"
        return None

    def __call__(self, q: Float[Tensor, "n Hq D"]) -> Float[Tensor, "n Hq P"]:
        """Coordinates of queries, float32, of B sequences or of one."""
        own = q.float().unflatten(1, (self.weights.shape[1], -1))
        return (own @ self.weights.float() * self.scale[:, :, None]).flatten(1, 2)
