"""`AsymmetricIVF`: the keys of one layer in k-means buckets, visited as a router says."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from . import checks, kmeans
from .faiss_backend import check_gpu_limits
from .file_fields import MOST, MOST_LISTS
from .ivf_search import BucketSearch
from .ivf_training import train_parts
from .lists import BucketStatistics, bucket_ranges, check_bounds, expand_heads, sizes_of
from .routers import CentroidRouter, Router
from .sorted_rows import SortedRows
from .spill import spilled_ranges


class AsymmetricIVF:
    """An inverted file for all KV heads of a layer; a trained classifier routes its queries.

    Each key of KV head h is in the bucket of its best centroid among `centroids[h]`; a query
    visits the buckets that `router` scores highest, which need not be those of the nearest
    centroids. The vector that chooses the bucket may differ from the one that is searched:
    attention keys are bucketed without RoPE and scored with it, so `add` and `search` take
    `route_by` as well.

    Rows of each head are in bucket order (`vectors`, `positions`), so a bucket is a range of rows.
    Added keys are pending until there are `flush_every` of them, and are then merged into their
    buckets. Every query visits all pending rows, in addition to its budget.

    Source: Saap, arXiv 2502.08246.
    """

    def __init__(
        self,
        d: int,
        n_kv: int,
        nlist: int,
        *,
        spill: bool = False,
        flush_every: int = 1024,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ):
        """`spill` puts each key into its two best buckets. Raises ValueError for bad options."""
        checks.at_least(1, d=d, n_kv=n_kv, nlist=nlist)
        checks.within(1, MOST, flush_every=flush_every)
        if dtype not in checks.DTYPES:
            raise ValueError(f"dtype must be {checks.listed(checks.DTYPES)}; got {dtype}")
        if spill and nlist < 2:
            raise ValueError(f"nlist must be at least 2 with spill; got {nlist}")
        self.d, self.n_kv, self.nlist = d, n_kv, nlist
        self.spill, self.flush_every, self.dtype = spill, flush_every, dtype
        self.device = torch.device(device)
        self.centroids: Float[Tensor, "Hkv nlist D"] | None = None
        self.router: Router | None = None
        self._rows = SortedRows.empty(n_kv, d, nlist, dtype=dtype, device=self.device, spill=spill)
        self._pending_routes: list[Tensor] = []
        self._faiss: BucketSearch | None = None

    @classmethod
    def from_trained(
        cls,
        centroids: Float[Tensor, "Hkv nlist D"],
        router: Router | None = None,
        *,
        spill: bool = False,
        flush_every: int = 1024,
        dtype: torch.dtype = torch.float32,
    ) -> "AsymmetricIVF":
        """Make an empty index over trained centroids.

        Without a router, queries visit the buckets of the nearest centroids, as in IVF.
        """
        if centroids.ndim != 3:
            raise ValueError(f"centroids must be [Hkv, nlist, D]; got {tuple(centroids.shape)}")
        kmeans.check_finite(centroids, "centroids")
        n_kv, nlist, d = centroids.shape
        checks.within(1, MOST_LISTS, nlist=nlist)
        if router is not None and router.nlist != nlist:
            raise ValueError(f"nlist of the router must be {nlist}; got {router.nlist}")
        index = cls(
            d, n_kv, nlist, spill=spill, flush_every=flush_every, dtype=dtype,
            device=centroids.device,
        )  # fmt: skip
        index.centroids = centroids.detach().resolve_neg().float()
        index.router = CentroidRouter(index.centroids) if router is None else router
        return index

    @property
    def is_trained(self) -> bool:
        return self.centroids is not None

    @property
    def ntotal(self) -> int:
        """The number of keys per head, pending ones included."""
        return self._rows.n_rows

    @property
    def n_pending(self) -> int:
        return self._rows.n_pending

    @property
    def vectors(self) -> Float[Tensor, "Hkv n D"]:
        """The keys in row order; the ranges of `select` are ranges of these rows."""
        return self._rows.vectors

    @property
    def positions(self) -> Int[Tensor, "Hkv n"]:
        """The position of each row's key."""
        return self._rows.positions

    @property
    def offsets(self) -> Int[Tensor, "Hkv nlist_plus_1"]:
        return self._rows.offsets

    @property
    def nbytes(self) -> int:
        """Memory of rows, centroids and router, and of FAISS's copy once `search` has made one."""
        held = self._rows.nbytes + sum(t.nbytes for t in self._pending_routes)
        if self.is_trained:
            held += self.centroids.nbytes
            held += 0 if isinstance(self.router, CentroidRouter) else self.router.nbytes
        held += 0 if self._faiss is None else self._faiss.nbytes
        return held

    def statistics(self) -> BucketStatistics:
        """The sizes of the buckets; pending keys are not counted."""
        return BucketStatistics.of(self.offsets)

    def train(
        self,
        xt: Float[Tensor, "Hkv n D"],
        xq_train: Float[Tensor, "Hq m D"] | None = None,
        *,
        router: str | None = None,
        xt_score: Float[Tensor, "Hkv n D"] | None = None,
        xq_score: Float[Tensor, "Hq m D"] | None = None,
        sm_scale: float | None = None,
        n_iter: int = 10,
        seed: int = 0,
        **fit_options,
    ) -> None:
        """Cluster `xt`, and fit a router to the attention mass of `xq_train` over the buckets.

        `xt, xq_train` are what buckets are chosen by; `xt_score, xq_score` (the same if not given)
        are what attention scores are computed from, times `sm_scale` (`d ** -0.5`). `router`:
        "mlp" (default), "linear" or "centroid" (default without queries). `fit_options` go to
        `fit_mlp` or `fit_linear`. For a partition and routers trained on a whole corpus see
        `saap.train` and `from_trained`. Raises ValueError for bad vectors, for fewer points than
        buckets, and when the index holds keys; the index is then unchanged.
        """
        if self.ntotal:
            raise ValueError(f"train must come before keys are added; got ntotal={self.ntotal}")
        checks.within(1, MOST_LISTS, nlist=self.nlist)
        checks.vectors("xt", xt, self.n_kv, self.d)
        self.centroids, self.router = train_parts(
            xt.to(self.device), xq_train, self.nlist, router=router, xt_score=xt_score,
            xq_score=xq_score, sm_scale=sm_scale, n_iter=n_iter, seed=seed, **fit_options,
        )  # fmt: skip

    def refine(self, x: Float[Tensor, "Hkv n D"], *, n_iter: int = 3) -> None:
        """Move the trained centroids by a few Lloyd steps on the vectors of this context.

        This must come before keys are added. Bucket numbers keep their meaning, so the router
        stays in use.
        """
        self._check_trained("refine")
        if self.ntotal:
            raise ValueError(f"refine must come before keys are added; got ntotal={self.ntotal}")
        checks.at_least(1, n_iter=n_iter)
        checks.vectors("x", x, self.n_kv, self.d)
        self.centroids = kmeans.refine_centroids(x.to(self.device), self.centroids, n_iter=n_iter)
        if isinstance(self.router, CentroidRouter):
            self.router = CentroidRouter(self.centroids)

    def add(
        self,
        xb: Float[Tensor, "Hkv n D"],
        positions: Int[Tensor, " n"] | None = None,
        *,
        route_by: Float[Tensor, "Hkv n D"] | None = None,
    ) -> None:
        """Add keys of all heads at `positions` (by default those after the highest one).

        `route_by` chooses the bucket (`xb` itself if not given). Raises ValueError, and leaves the
        index unchanged, when it is not trained, for another shape or dtype, for NaN or inf, and
        for a position that occurs twice.
        """
        self._check_trained("add")
        checks.vectors("xb", xb, self.n_kv, self.d, self.dtype)
        route_by = xb if route_by is None else route_by
        checks.same_shape("route_by", route_by, "xb", xb)
        checks.vectors("route_by", route_by, self.n_kv, self.d)
        first = self._rows.highest + 1
        if positions is None:
            positions = torch.arange(first, first + xb.shape[1])
        else:
            checks.new_positions(positions, xb.shape[1], self.positions[0], first)
        self._rows.append(xb.detach().to(self.device), positions)
        self._pending_routes.append(route_by.detach().to(self.device, torch.float32).clone())
        if self.n_pending >= self.flush_every:
            self.flush()

    def flush(self) -> None:
        """Merge the pending keys into their buckets."""
        if not self.n_pending:
            return
        routes = torch.cat(self._pending_routes, 1)
        if self.spill:
            buckets, second = kmeans.assign_two(routes, self.centroids)
        else:
            buckets, second = kmeans.assign(routes, self.centroids), None
        if self._faiss is not None:
            pending = slice(self._rows.n_sorted, self._rows.n_rows)
            self._faiss.fill(self.vectors[:, pending], self.positions[:, pending], buckets, second)
        self._rows.merge(buckets, second)
        self._pending_routes = []

    def remove(self, positions: Int[Tensor, " m"]) -> int:
        """Forget the keys at these positions and return how many there were.

        Positions without a key are ignored. Raises ValueError for anything but integers `[m]`.
        """
        checks.integers("positions", positions)
        return self._keep(~torch.isin(self.positions, positions.to(self.device)))

    def truncate(self, length: int) -> int:
        """Forget the keys at positions from `length` on and return how many there were."""
        checks.at_least(0, length=length)
        return self._keep(self.positions < length)

    def route(self, xq: Float[Tensor, "n Hq D"]) -> Float[Tensor, "n Hq nlist"]:
        """The router's score of each bucket for each query."""
        self._check_trained("route")
        checks.queries("xq", xq, self.n_kv, self.d, self.router.n_heads)
        return self.router.mass(xq, self.offsets.diff(dim=-1)[None])

    def select(
        self,
        xq: Float[Tensor, "n Hq D"],
        *,
        nprobe: int | None = None,
        max_tokens: int | None = None,
        top_p: float | None = None,
        share: str = "group",
    ) -> tuple[Int[Tensor, "n H R"], Int[Tensor, "n H R"]]:
        """The rows to visit, as ranges `starts, lengths` int32 `[n, Hkv or Hq, R]`.

        `xq` are the vectors that queries are routed by. `nprobe` visits that many buckets;
        `max_tokens` visits buckets until that many rows are reached, and cuts the last bucket to
        its newest rows; `top_p` visits buckets until their predicted mass reaches that share of
        all (learned routers only). Of several, the one that is reached first ends the selection.
        `share`: "group" makes one selection for all query heads of a KV head, by the sum of their
        scores; "head" makes one for each query head. The pending rows are the last range, in
        addition to the budget. No row is in two ranges. FAISS is not used and no keys are copied.
        """
        check_bounds(self.nlist, nprobe, max_tokens, top_p)
        scores = self._list_scores(xq, xq, share)
        if top_p is not None and isinstance(self.router, CentroidRouter):
            raise ValueError(
                f"top_p must be None with a centroid router, which predicts no mass; got {top_p}"
            )
        bounds = {"nprobe": nprobe, "max_tokens": max_tokens, "top_p": top_p}
        if self.spill:
            n_sorted = self._rows.n_sorted
            starts, lengths = spilled_ranges(
                scores, self.offsets, self._rows.second, self.positions[:, :n_sorted], **bounds
            )
        else:
            starts, lengths = bucket_ranges(scores, self.offsets[None], **bounds)
        if self.n_pending:
            last = starts.new_full((*starts.shape[:-1], 1), self._rows.n_sorted)
            starts = torch.cat([starts, last], -1)
            lengths = torch.cat([lengths, torch.full_like(last, self.n_pending)], -1)
        return starts, lengths

    def search(
        self,
        xq: Float[Tensor, "n Hq D"],
        k: int,
        nprobe: int,
        *,
        route_by: Float[Tensor, "n Hq D"] | None = None,
        share: str = "group",
    ) -> tuple[Float[Tensor, "n Hq k"], Int[Tensor, "n Hq k"]]:
        """Find the k keys with the largest inner products in the visited buckets, through FAISS.

        The buckets are those that `select(route_by, nprobe=nprobe, share=share)` visits. Returns
        scores, best first, and positions; -inf and -1 where fewer keys were visited. The first
        search copies the keys into FAISS as float32. On a GPU k and nprobe are at most 2048 (k
        1024 with spill).
        """
        checks.at_least(1, k=k)
        check_bounds(self.nlist, nprobe, None, None)
        checks.queries("xq", xq, self.n_kv, self.d)
        route_by = xq if route_by is None else route_by
        checks.same_shape("route_by", route_by, "xq", xq)
        wanted = 2 * k if self.spill else k
        check_gpu_limits(self.device, k=wanted, nprobe=nprobe)
        occupied = self.offsets.diff(dim=-1)
        if self.spill:
            occupied = occupied + sizes_of(self._rows.second, self.nlist)
        scores = self._list_scores(xq, route_by, share)
        scores = scores.masked_fill(expand_heads(occupied[None] == 0, scores.shape[1]), -torch.inf)
        visited = expand_heads(scores.topk(nprobe, dim=-1).indices, xq.shape[1])
        if self._faiss is None:
            self._faiss = BucketSearch(self.centroids, self._rows)
        return self._faiss.search(xq, k, visited, self._rows)

    def save(self, path) -> None:
        """Write one safetensors file (`saap.index.ivf_file`); pending keys are merged first."""
        from .ivf_file import save

        save(self, path)

    @classmethod
    def load(cls, path, *, device: str | torch.device = "cpu") -> "AsymmetricIVF":
        """Open a file that `save` wrote; on the CPU it is mapped and read as it is searched."""
        from .ivf_file import load

        return load(path, device=device)

    def _check_trained(self, what: str) -> None:
        if not self.is_trained:
            raise ValueError(
                f"{what} must come after training; got an untrained index: call train, or use "
                "from_trained"
            )

    def _list_scores(self, xq, route_by, share: str):
        """The score of each list: lists with higher scores are visited first."""
        if share not in ("group", "head"):
            raise ValueError(f"share must be 'group' or 'head'; got {share!r}")
        scores = self.route(route_by)
        return scores if share == "head" else scores.unflatten(1, (self.n_kv, -1)).sum(2)

    def _keep(self, kept) -> int:
        removed = int((~kept[0]).sum()) if self.ntotal else 0
        if removed:
            pending = kept[0, self._rows.n_sorted :]
            if self.n_pending:
                self._pending_routes = [torch.cat(self._pending_routes, 1)[:, pending]]
            self._rows.keep(kept, int(pending.sum()))
            self._faiss = None
        return removed
