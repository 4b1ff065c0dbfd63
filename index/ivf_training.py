"""Train the parts of an `AsymmetricIVF`: its centroids, and a router fitted to queries."""

import torch
from jaxtyping import Float
from torch import Tensor

from . import checks, fitting, kmeans
from .routers import TRAINABLE, CentroidRouter, Router
from .targets import query_masses

COUNTS = ("hidden", "steps", "batch")
"""Options of a fit that are whole numbers from 1."""


def train_parts(
    xt: Float[Tensor, "Hkv n D"],
    xq_train: Float[Tensor, "Hq m D"] | None,
    nlist: int,
    *,
    router: str | None,
    xt_score: Float[Tensor, "Hkv n D"] | None,
    xq_score: Float[Tensor, "Hq m D"] | None,
    sm_scale: float | None,
    n_iter: int,
    seed: int,
    **fit_options,
) -> tuple[Float[Tensor, "Hkv nlist D"], Router]:
    """Train centroids and router; `AsymmetricIVF.train` describes the arguments.

    `xt` is checked by the caller. Raises ValueError for an unknown router, for queries that do not
    fit it or `xt`, and as `kmeans.train_centroids`, before any time is spent where that is
    possible.
    """
    router = router or ("centroid" if xq_train is None else "mlp")
    if router not in TRAINABLE:
        raise ValueError(f"router must be one of {', '.join(TRAINABLE)}; got {router!r}")
    if (xq_train is None) != (router == "centroid"):
        needed = "centroid without" if xq_train is None else "mlp or linear with"
        raise ValueError(f"router must be {needed} training queries; got {router!r}")
    n_kv, _, d = xt.shape
    scored = xt if xt_score is None else xt_score
    asked = xq_train if xq_score is None else xq_score
    if xq_train is not None:
        checks.queries("xq_train", xq_train.transpose(0, 1), n_kv, d)
        checks.same_shape("xt_score", scored, "xt", xt)
        checks.same_shape("xq_score", asked, "xq_train", xq_train)
        checks.vectors("xt_score", scored, n_kv, d)
        checks.queries("xq_score", asked.transpose(0, 1), n_kv, d)
        if xq_train.shape[1] < 2:
            raise ValueError(
                f"xq_train must hold at least 2 queries to fit a router; got {xq_train.shape[1]}"
            )
        checks.at_least(1, **{n: v for n, v in fit_options.items() if n in COUNTS})
    centroids = kmeans.train_centroids(xt, nlist, n_iter=n_iter, seed=seed)
    if xq_train is None:
        return centroids, CentroidRouter(centroids)
    device = xt.device
    buckets = kmeans.assign(xt, centroids)
    masses = query_masses(
        asked.to(device),
        scored.to(device),
        buckets,
        nlist,
        sm_scale=d**-0.5 if sm_scale is None else sm_scale,
    )
    queries = xq_train.to(device).float()
    if router == "linear":
        return centroids, fitting.fit_linear(queries, masses, **fit_options)
    sizes = torch.stack([torch.bincount(b.long(), minlength=nlist) for b in buckets])
    seen_by = torch.zeros(queries.shape[1], dtype=torch.long, device=device)
    with torch.enable_grad():
        fitted = fitting.fit_mlp(
            queries, masses, sizes[:, None], seen_by, seed=seed, **fit_options
        )
    return centroids, fitted
