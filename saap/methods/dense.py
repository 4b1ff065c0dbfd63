"""Dense attention: every row is visited. The reference that all others approximate."""

import torch

from .base import Method, Selector


class DenseSelector(Selector):
    def __init__(self, n_kv: int, n_middle: int):
        self.n_kv, self.n_middle = n_kv, n_middle

    def select(self, q_rope, q_derope, budget):
        shape = (q_rope.shape[0], self.n_kv, 1)
        starts = torch.zeros(shape, dtype=torch.int32, device=q_rope.device)
        return starts, torch.full_like(starts, self.n_middle)


class Dense(Method):
    name = "dense"
    needs_index = False

    def build(self, keys):
        return DenseSelector(*keys.k_rope.shape[1:3])
