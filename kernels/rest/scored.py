"""What a choice of rows has found out of those that it scored and did not choose."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Scored:
    """Of the rows that a step leaves out, those that were scored, for n queries.

    `lse [n, Hq]` float32: the log-sum-exp of each head's scores with them, less what
    `sm_scale * q @ mean` adds to every score; -inf where there are none. `mean [1 or n, Hkv, D]`
    float32. `n_scored [n, H]` int64, H being Hkv, or Hq where each query head chose alone: how
    many rows were scored, the chosen ones counted in. Each head's best `n_best` rows are among
    them, or one of `one_of` where these are more, or all of them where there are fewer.
    """

    lse: Float[Tensor, "n Hq"]
    mean: Float[Tensor, "maps Hkv D"]
    n_scored: Int64[Tensor, "n H"]
    n_best: int
    one_of: int | None = None

    def check(self, q: Float[Tensor, "n Hq D"], n_kv: int) -> None:
        """ValueError where this is not of such queries."""
        n, heads, dim = q.shape
        maps = (1, n_kv, dim), (n, n_kv, dim)
        of_heads = (n, n_kv), (n, heads)
        for name, tensor, shapes, dtype in (
            ("lse", self.lse, ((n, heads),), torch.float32),
            ("mean", self.mean, maps, torch.float32),
            ("n_scored", self.n_scored, of_heads, torch.int64),
        ):
            if tensor.shape not in shapes or tensor.dtype != dtype or tensor.device != q.device:
                raise ValueError(
                    f"{name} of scored rows must be {' or '.join(map(str, dict.fromkeys(shapes)))}"
                    f", {str(dtype)[6:]} on {q.device}; got {tuple(tensor.shape)}, "
                    f"{str(tensor.dtype)[6:]} on {tensor.device}"
                )
        for name, value, least in (("n_best", self.n_best, 0), ("one_of", self.one_of or 1, 1)):
            if not least <= value < 2**63:
                raise ValueError(f"{name} must be in {least}..2**63 - 1; got {value}")
