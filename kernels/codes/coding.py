"""Codes of keys, written where the rows of a context keep theirs."""

import torch
from jaxtyping import Float
from torch import Tensor

from saap.kernels.backends import installed

from .layout import Codes, encode


def encode_rows(
    x: Float[Tensor, "Hkv n P"],
    importance: Float[Tensor, "Hkv P"],
    codes: Codes,
    sequence: int,
    first: int,
    *,
    impl: str | None = None,
) -> None:
    """Code keys as `encode` does, into the rows of one sequence from `first` on.

    Args:
        x: float32 coordinates of keys, of unit variance over all keys. NaN and infinities count
            as 0.
        importance: float32, what an error of each coordinate counts in a score.
        codes: what is written to, on the device of x.
        impl: `"reference"`, `"numba"` (CPU), or None, the best that can do it. They differ where
            a sum's last bit decides how something is rounded.

    Raises:
        ValueError: shapes that do not fit, rows that are not there, another `impl`.
    """
    batch, n_kv, held = codes.scale.shape
    n = x.shape[1]
    if x.shape != (n_kv, n, codes.coordinates) or importance.shape != (n_kv, codes.coordinates):
        raise ValueError(
            f"x and importance must be [{n_kv}, n, {codes.coordinates}] and "
            f"[{n_kv}, {codes.coordinates}]; got {tuple(x.shape)} and {tuple(importance.shape)}"
        )
    if x.dtype != torch.float32 or importance.dtype != torch.float32:
        raise ValueError(f"x and importance must be float32; got {x.dtype} and {importance.dtype}")
    if not (0 <= sequence < batch and 0 <= first <= first + n <= held):
        raise ValueError(
            f"rows must be in 0..{held} of sequence 0..{batch - 1}; got {first} to {first + n} of "
            f"sequence {sequence}"
        )
    if impl not in (None, "reference", "numba"):
        raise ValueError(f"impl must be None, 'reference' or 'numba'; got {impl!r}")
    on_cpu = x.device.type == importance.device.type == "cpu"
    misplaced = codes.fault or codes.misplaced(x.device)
    if impl == "numba" and (misplaced or not on_cpu):
        raise ValueError(misplaced or f"impl 'numba' needs the CPU; got x on {x.device}")
    if n == 0:
        return
    usable = impl is None and on_cpu and misplaced is None and installed("numba")
    if impl == "numba" or usable:
        from .numba_coding import encode_rows as write

        write(x, importance, codes, sequence, first)
        return
    new, rows = encode(x[None], importance[None]), slice(first, first + n)
    codes.coarse[sequence, ..., rows] = new.coarse[0]
    codes.fine[sequence, :, rows] = new.fine[0]
    codes.scale[sequence, :, rows] = new.scale[0]
