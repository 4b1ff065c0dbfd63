"""Learned routing over a k-means partition of de-RoPEd keys.

`saap` scores buckets with the trained classifier (Saap, arXiv 2502.08246, section 4.2); `linear`
with the closed-form least-squares map from query to bucket mass. For a selection shared by a KV
group the predicted masses of its query heads are added.
"""

from saap.index.kmeans import assign
from saap.index.lists import expand_heads, invert

from .base import BucketSelector, Method, group_sum

# Where the budget is rows, a bucket is worth its mass per row. Predicted masses of small buckets
# are noisy, so the size counts by its root: between mass and mass per row, better than both.
SIZE_POWER = 0.5


class RoutedSelector(BucketSelector):
    def __init__(self, keys, centroids, router):
        super().__init__(invert(assign(keys.k_derope, centroids), centroids.shape[1]))
        self.router = router
        self.nbytes = router.nbytes
        self.n_kv = centroids.shape[0]

    def scores(self, q_rope, q_derope, budget):
        mass = self.router.mass(q_derope)
        if budget.share == "group":
            mass = group_sum(mass, self.n_kv)
        if budget.max_tokens is None:
            return mass
        sizes = expand_heads(self.lists.sizes.float().clamp(min=1), mass.shape[1])
        return mass / sizes**SIZE_POWER


class Linear(Method):
    name = "linear"
    router = "linear"

    def build(self, keys):
        layer = self.index.layers[keys.layer]
        return RoutedSelector(keys, layer.centroids, layer.router(self.router))


class Saap(Linear):
    name = "saap"
    router = "mlp"
