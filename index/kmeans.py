"""Spherical k-means: training, assignment, refinement on new points."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from . import faiss_backend
from .lists import sizes_of


def check_points(points: Tensor, nlist: int) -> None:
    if points.ndim != 3:
        raise ValueError(f"points must be [H, n, D]; got {tuple(points.shape)}")
    if not points.is_floating_point():
        raise ValueError(f"points must be floating-point vectors; got {points.dtype}")
    if not 1 <= nlist <= points.shape[1]:
        raise ValueError(
            f"nlist must be in 1..{points.shape[1]}, the number of points per head; got {nlist}"
        )
    check_finite(points, "points")
    zeros = int((points == 0).all(-1).sum())
    if zeros:
        raise ValueError(f"points must be non-zero; got {zeros} zero vectors")


def check_finite(x: Tensor, name: str) -> None:
    if not torch.isfinite(x).all():
        raise ValueError(f"{name} must be finite; got NaN or inf")


def train_centroids(
    points: Float[Tensor, "H n D"], nlist: int, *, n_iter: int = 10, seed: int = 0
) -> Float[Tensor, "H nlist D"]:
    """Spherical k-means of each head's points: float32 unit vectors `[H, nlist, D]`.

    `points` are normalised first, so a centroid is a direction; assignment is by largest inner
    product (`assign`). The same seed gives the same centroids on the same machine and number of
    threads. FAISS computes it; on a GPU that its build does not support, `lloyd` does. Raises
    ValueError for fewer points than buckets, for NaN or inf, and for zero vectors.

    Source: Saap, arXiv 2502.08246, section 3.3.
    """
    check_points(points, nlist)
    use_gpu = points.is_cuda and faiss_backend.has_gpu()
    if points.is_cuda and not use_gpu:
        return lloyd(points, nlist, n_iter=n_iter, seed=seed)
    centroids = [
        faiss_backend.cluster(
            directions_of(head),
            nlist,
            n_iter=n_iter,
            seed=seed,
            use_gpu=use_gpu,
        )
        for head in points
    ]
    return torch.stack(centroids).to(points.device)


def directions_of(points: Float[Tensor, "*heads n D"]) -> Float[Tensor, "*heads n D"]:
    """Unit vectors, also of points whose squares float32 cannot hold."""
    points = points.float()
    largest = points.abs().amax(-1, keepdim=True)
    if float(largest.max()) > 1e18 or float(largest.min()) < 1e-10:
        points = points / largest
    return torch.nn.functional.normalize(points, dim=-1)


def lloyd(
    points: Float[Tensor, "H n D"], nlist: int, *, n_iter: int = 10, seed: int = 0
) -> Float[Tensor, "H nlist D"]:
    """Spherical k-means as `train_centroids`, in torch alone.

    It starts at points drawn without repetition. Buckets that end up empty restart at
    points of the largest ones, as FAISS splits them; with fewer distinct points than buckets, some
    stay empty.
    """
    directions = directions_of(points)
    generator = torch.Generator().manual_seed(seed)
    first = torch.randperm(points.shape[1], generator=generator)[:nlist].to(points.device)
    centroids = directions[:, first].clone()
    for left in range(n_iter - 1, -1, -1):
        centroids = refine_centroids(directions, centroids, n_iter=1)
        if left == 1:
            _restart_empty(centroids, directions)
    return centroids


def _restart_empty(centroids: Tensor, directions: Tensor) -> None:
    buckets = assign(directions, centroids).long()
    sizes = sizes_of(buckets, centroids.shape[1])
    for head in (sizes == 0).any(1).nonzero()[:, 0].tolist():
        empty = (sizes[head] == 0).nonzero()[:, 0].tolist()
        occupied = int((sizes[head] > 0).sum())
        largest = sizes[head].argsort(descending=True)[:occupied].tolist()
        for bucket, source in zip(empty, largest, strict=False):
            members = (buckets[head] == source).nonzero()[:, 0]
            centroids[head, bucket] = directions[head, members[len(members) // 2]]


def assign(
    points: Float[Tensor, "*batch H n D"],
    centroids: Float[Tensor, "H nlist D"],
    *,
    chunk: int = 65536,
) -> Int[Tensor, "*batch H n"]:
    """The bucket of each point, int32: the centroid with the largest inner product.

    The length of a point does not matter. Works in chunks of `chunk` points, so memory is bounded
    by `chunk * nlist` floats per head.
    """
    buckets = torch.empty(points.shape[:-1], dtype=torch.int32, device=points.device)
    for start in range(0, points.shape[-2], chunk):
        part = points[..., start : start + chunk, :].float()
        buckets[..., start : start + chunk] = (part @ centroids.mT.to(part)).argmax(-1)
    return buckets


def assign_two(
    points: Float[Tensor, "H n D"], centroids: Float[Tensor, "H nlist D"], *, chunk: int = 65536
) -> tuple[Int[Tensor, "H n"], Int[Tensor, "H n"]]:
    """The best and the second-best bucket of each point, int32; there must be two buckets."""
    if centroids.shape[1] < 2:
        raise ValueError("nlist must be at least 2 with spill; got 1")
    best = [
        (points[:, start : start + chunk].float() @ centroids.mT.to(points.device))
        .topk(2, dim=-1)
        .indices.int()
        for start in range(0, points.shape[1], chunk)
    ]
    both = torch.cat(best, 1)
    return both[..., 0].contiguous(), both[..., 1].contiguous()


def refine_centroids(
    points: Float[Tensor, "H n D"], centroids: Float[Tensor, "H nlist D"], *, n_iter: int = 3
) -> Float[Tensor, "H nlist D"]:
    """Move `centroids` by a few Lloyd steps on `points`.

    A bucket that gets no points keeps its centroid. Buckets keep their numbers, so a router that
    was trained for `centroids` stays valid. Raises ValueError as `train_centroids` does, but there
    may be fewer points than buckets.
    """
    check_points(points, 1)
    directions = directions_of(points)
    centroids = centroids.float().clone()
    for _ in range(n_iter):
        buckets = assign(directions, centroids).long()[..., None].expand_as(directions)
        sums = torch.zeros_like(centroids).scatter_add_(1, buckets, directions)
        length = sums.norm(dim=-1, keepdim=True)
        centroids = torch.where(length > 1e-6, sums / length.clamp(min=1e-6), centroids)
    return centroids


def mean_products(
    points: Float[Tensor, "H n D"], centroids: Float[Tensor, "H nlist D"]
) -> Float[Tensor, "H nlist"]:
    """The mean inner product of the points of each bucket with its centroid, float32."""
    found = []
    for own_points, own in zip(points, centroids, strict=True):
        buckets = assign(own_points[None], own[None])[0].long()
        products = (own_points.float() * own[buckets]).sum(-1)
        total = products.new_zeros(len(own)).scatter_add_(0, buckets, products)
        count = torch.bincount(buckets, minlength=len(own))
        # A bucket without points in the sample gets the mean over all points.
        found.append((total + products.mean()) / (count + 1))
    return torch.stack(found)
