"""The map of queries to the coordinates of codes, in 16 bits: every step reads the whole of it."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int16
from torch import Tensor

LARGEST = 2**15 - 1


@dataclass(frozen=True, eq=False)
class QueryMap:
    """A query `q [D]` of KV head h has the coordinates `(q @ weights[b, h]) * scale[b, h]`.

    `weights` int16 `[B, Hkv, D, P]`, `scale` float32 `[B, Hkv, P]`, of B sequences or of all
    (`B = 1`). Whole numbers with a scale for each coordinate rather than bfloat16: the large parts
    of a coordinate may cancel, and what is left would drown in what bfloat16 errs by.
    """

    weights: Int16[Tensor, "B Hkv D P"]
    scale: Float[Tensor, "B Hkv P"]

    @classmethod
    def of(cls, matrix: Float[Tensor, "B Hkv P D"]) -> "QueryMap":
        """The map `q -> matrix @ q`."""
        largest = matrix.abs().amax(-1)
        scale = torch.where(largest > 0, largest / LARGEST, 1.0).float()
        weights = (matrix / scale[..., None]).round().to(torch.int16)
        return cls(weights.mT.contiguous(), scale)

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
        if not fits or weights.dtype != torch.int16 or scale.dtype != torch.float32:
            return (
                "query_map must be int16 [B, Hkv, D, P] with float32 scales [B, Hkv, P]; got "
                f"{weights.dtype} {list(weights.shape)} and {scale.dtype} {list(scale.shape)}"
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
