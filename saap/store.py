"""The KV store of one layer: `sinks | middle in bucket order | tail in time order`."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


class LayerStore:
    """Keys (RoPE'd) and values of one layer, `[B, Hkv, capacity, D]`, held once.

    Built from a prefilled cache: the middle is permuted into the order its index asks for, all
    later tokens go to the tail, in place. Attention does not care about the order of rows.
    """

    def __init__(
        self,
        k_rope: Float[Tensor, "B Hkv N D"],
        v: Float[Tensor, "B Hkv N D"],
        *,
        n_sink: int,
        window: int,
        order: Int[Tensor, "B Hkv M"] | None = None,
        spare: int = 256,
    ):
        batch, heads, n, dim = k_rope.shape
        self.first_middle, self.first_tail = middle_bounds(n, n_sink, window)
        n_middle = self.first_tail - self.first_middle
        if order is not None and order.shape != (batch, heads, n_middle):
            raise ValueError(
                f"order has shape {tuple(order.shape)}: accepted is {(batch, heads, n_middle)}"
            )
        self.length = self.n_context = n
        self.k = k_rope.new_empty(batch, heads, n + spare, dim)
        self.v = v.new_empty(batch, heads, n + spare, dim)
        for mine, given in ((self.k, k_rope), (self.v, v)):
            mine[:, :, :n] = given
            if order is not None:
                rows = (order + self.first_middle)[..., None].expand(-1, -1, -1, dim)
                mine[:, :, self.first_middle : self.first_tail] = given.gather(2, rows)

    def append(self, k_rope: Float[Tensor, "B Hkv T D"], v: Float[Tensor, "B Hkv T D"]) -> None:
        end = self.length + k_rope.shape[2]
        if end > self.k.shape[2]:
            raise ValueError(f"{end} tokens: accepted are at most capacity={self.k.shape[2]}")
        self.k[:, :, self.length : end] = k_rope
        self.v[:, :, self.length : end] = v
        self.length = end

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens; they must not reach into the middle."""
        if not self.first_tail <= length <= self.length:
            raise ValueError(f"length={length}: accepted are {self.first_tail} to {self.length}")
        self.length = length

    def local_ranges(self, length: int | None = None) -> list[tuple[int, int]]:
        """`(start, length)` of sinks and tail: what every query visits."""
        length = self.length if length is None else length
        return [(0, self.first_middle), (self.first_tail, length - self.first_tail)]


def middle_bounds(n: int, n_sink: int, window: int) -> tuple[int, int]:
    """First row of the middle and first row after it, of n cached tokens."""
    first = min(n_sink, n)
    return first, max(first, n - window)


def with_local(
    starts: Int[Tensor, "B H R"], lengths: Int[Tensor, "B H R"], local: list[tuple[int, int]]
) -> tuple[Int[Tensor, "B H R2"], Int[Tensor, "B H R2"]]:
    """Put the ranges that all rows share before the selected ones."""
    shape = (*starts.shape[:2], len(local))
    fixed = torch.tensor(local, dtype=torch.int32, device=starts.device)
    return (
        torch.cat([fixed[:, 0].expand(shape), starts], -1),
        torch.cat([fixed[:, 1].expand(shape), lengths], -1),
    )
