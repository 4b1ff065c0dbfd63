"""Sizes that are chosen by the context, unless they are given."""

import math

N_SEGMENTS = 16


def default_nlist(context: int) -> int:
    """Buckets for a context: the power of two nearest to context / 32, from 16 to 1024.

    1024 from 32k on, as in the paper; about 32 rows per bucket below, so that 5 % of a short
    context is still several buckets.
    """
    return min(1024, max(16, 2 ** round(math.log2(max(context, 1) / 32))))
