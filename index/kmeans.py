"""Spherical k-means through FAISS; the only file of the package that imports faiss."""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor


def _faiss():
    try:
        import faiss
    except ImportError as error:
        raise ImportError(
            "k-means needs FAISS: pip install 'saap[cpu]' (or 'saap[gpu]', never both)"
        ) from error
    return faiss


def check_points(points: Tensor, nlist: int) -> None:
    if points.ndim != 3:
        raise ValueError(f"points has shape {tuple(points.shape)}: accepted is [H, n, D]")
    if not 1 <= nlist <= points.shape[1]:
        raise ValueError(
            f"nlist={nlist} with {points.shape[1]} points a head: accepted are 1 to that number"
        )
    if not torch.isfinite(points).all():
        raise ValueError("points holds NaN or inf: accepted are finite vectors")


def train_centroids(
    points: Float[Tensor, "H n D"], nlist: int, *, n_iter: int = 10, seed: int = 0
) -> Float[Tensor, "H nlist D"]:
    """Spherical k-means of each head's points: float32 unit vectors `[H, nlist, D]`.

    `points` are normalised first, so a centroid is a direction; assignment is by largest inner
    product (`assign`). The same seed gives the same centroids on the same machine and thread count.
    Raises ValueError for fewer points than buckets and for NaN or inf.

    Source: Saap, arXiv 2502.08246, section 3.3.
    """
    check_points(points, nlist)
    faiss = _faiss()
    use_gpu = points.is_cuda and getattr(faiss, "get_num_gpus", lambda: 0)() > 0
    centroids = []
    for head in points:
        x = torch.nn.functional.normalize(head.float(), dim=-1).cpu().numpy()
        kmeans = faiss.Kmeans(
            x.shape[1],
            nlist,
            niter=n_iter,
            spherical=True,
            seed=seed,
            gpu=use_gpu,
            min_points_per_centroid=1,
            max_points_per_centroid=1 << 30,
        )
        kmeans.train(np.ascontiguousarray(x))
        centroids.append(torch.from_numpy(kmeans.centroids.reshape(nlist, -1).copy()))
    return torch.stack(centroids).to(points.device)


def assign(
    points: Float[Tensor, "*batch H n D"],
    centroids: Float[Tensor, "H nlist D"],
    *,
    chunk: int = 65536,
) -> Int[Tensor, "*batch H n"]:
    """The bucket of each point, int32: the centroid with the largest inner product.

    The length of a point does not matter. Works in chunks of `chunk` points, so memory is bounded
    by `chunk * nlist` floats a head.
    """
    buckets = torch.empty(points.shape[:-1], dtype=torch.int32, device=points.device)
    for start in range(0, points.shape[-2], chunk):
        part = points[..., start : start + chunk, :].float()
        buckets[..., start : start + chunk] = (part @ centroids.mT.to(part)).argmax(-1)
    return buckets
