"""Dense attention: every row is visited. The reference that all others approximate."""

import torch

from saap.budget import BOUNDS
from saap.selector import Selector

from .base import Method


class DenseSelector(Selector):
    bounds = BOUNDS

    def select(self, query, middle, budget, room):
        if len(set(middle.n_rows)) > 1:
            return everything(query, middle)
        starts, lengths = room.take(len(query.q_rope), middle.n_kv, 1, middle.device)
        starts.fill_(middle.first_row)
        lengths.fill_(middle.n_rows[0])
        return starts, lengths


def everything(query, middle):
    """One range for each query and KV head: the whole middle."""
    shape = (len(query.q_rope), middle.n_kv, 1)
    starts = torch.full(shape, middle.first_row, dtype=torch.int32, device=middle.device)
    rows = torch.tensor(middle.n_rows, dtype=torch.int32, device=middle.device)
    return starts, rows[:, None, None].expand(shape).contiguous()


class Dense(Method):
    name = "dense"
    needs_index = False
    saves_itself = True
    is_exact = True
    bounds = BOUNDS

    def selector(self, layer):
        return DenseSelector()
