"""What the kernel benchmarks read: selections in buckets, ragged lengths. NumPy alone."""

import math

import numpy as np

Lists = tuple[np.ndarray, np.ndarray]
BUCKET_SIGMA = 0.7


def bucket_lists(
    draw: np.random.Generator, lists: int, nlist: int, first: int, last: int, wanted: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """`lists` selections of about `wanted` rows of `[first, last)`, in whole buckets.

    The rows are in `nlist` buckets of log-normal size, of which a selection takes random ones.

    Returns:
        Starts and lengths of the ranges of each list.
    """
    starts, lengths = [], []
    for _ in range(lists):
        weights = draw.lognormal(0, BUCKET_SIGMA, nlist)
        ends = np.floor(np.cumsum(weights) / weights.sum() * (last - first)).astype(int)
        sizes = np.diff(ends, prepend=0)
        order = draw.permutation(nlist)
        chosen = order[: 1 + np.searchsorted(np.cumsum(sizes[order]), wanted)]
        starts.append(first + (ends - sizes)[chosen])
        lengths.append(sizes[chosen])
    return starts, lengths


def padded(lists: list[np.ndarray]) -> np.ndarray:
    """int32 `[lists, R]`, the shorter ones filled with 0: of lengths, unused ranges."""
    width = max(map(len, lists))
    return np.stack([np.pad(x, (0, width - len(x))) for x in lists]).astype(np.int32)


def ragged_lengths(batch: int, shortest: int, longest: int) -> np.ndarray:
    """Log-uniform from `shortest` to `longest`; the same for the same batch."""
    exponents = np.random.default_rng(batch).uniform(0, math.log(longest / shortest), batch)
    return (np.exp(exponents) * shortest).astype(int)
