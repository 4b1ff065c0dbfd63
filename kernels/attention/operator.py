"""`attend_ranges` as an operator of torch, which a compiled function keeps whole in its graph.

Outside compiled functions nobody takes this way round: an operator costs some microseconds more.
"""

import torch
from torch import Tensor


@torch.library.custom_op("saap::attend_ranges", mutates_args=())
def attend_ranges(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    lengths: Tensor,
    sm_scale: float | None,
    softcap: float | None,
    impl: str | None,
) -> tuple[Tensor, Tensor]:
    from . import api

    return api.attend_ranges(
        q, k, v, starts, lengths, sm_scale=sm_scale, softcap=softcap, impl=impl
    )


@attend_ranges.register_fake
def _(q, k, v, starts, lengths, sm_scale, softcap, impl):
    out = q.new_empty(q.shape)
    return out, q.new_empty(q.shape[:2], dtype=torch.float32)
