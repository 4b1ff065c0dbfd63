"""Every use of FAISS in this package; no other file of it imports faiss.

Arrays go through numpy on the CPU and by address on a GPU, without `faiss.contrib.torch_utils`,
which patches FAISS's classes for the whole process. `swig_ptr` keeps no reference to its array, so
every array stays bound to a name until the call that reads it is over.
"""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

GPU_LIMIT = 2048
"""Largest k and nprobe of FAISS's GPU classes."""


def load_faiss():
    """Return the faiss module; the ImportError says which extra installs it."""
    try:
        import faiss
    except ImportError as error:
        raise ImportError(
            "vector search needs FAISS: pip install 'saap[cpu]' (or 'saap[gpu]', never both); got "
            f"{error}"
        ) from error
    return faiss


def has_gpu() -> bool:
    """Whether FAISS is installed and can use a GPU."""
    try:
        return getattr(load_faiss(), "get_num_gpus", lambda: 0)() > 0
    except ImportError:
        return False


def as_array(x: Float[Tensor, "n D"]) -> np.ndarray:
    return np.ascontiguousarray(x.detach().float().cpu().numpy())


def cluster(
    x: Float[Tensor, "n D"], nlist: int, *, n_iter: int, seed: int, use_gpu: bool = False
) -> Float[Tensor, "nlist D"]:
    """Spherical k-means of unit vectors. 31 bits of a seed count: FAISS takes the time for a seed
    below 0."""
    faiss = load_faiss()
    kmeans = faiss.Kmeans(
        x.shape[1],
        nlist,
        niter=n_iter,
        spherical=True,
        seed=seed % 2**31,
        gpu=use_gpu,
        min_points_per_centroid=1,
        max_points_per_centroid=1 << 30,
    )
    kmeans.train(as_array(x))
    return torch.from_numpy(kmeans.centroids.reshape(nlist, -1).copy())


class InvertedFile:
    """`IndexIVFFlat` (inner product) of one head, with buckets that the caller chooses.

    On a CUDA device the lists live in `GpuIndexIVFFlat`, which takes k and nprobe up to
    `GPU_LIMIT`.
    """

    def __init__(self, centroids: Float[Tensor, "nlist D"]):
        faiss = load_faiss()
        self.device = centroids.device
        self.nlist, self.dim = centroids.shape
        quantizer = faiss.IndexFlatIP(self.dim)
        quantizer.add(as_array(centroids))
        flat = faiss.IndexIVFFlat(quantizer, self.dim, self.nlist, faiss.METRIC_INNER_PRODUCT)
        flat.own_fields = False
        flat.is_trained = True
        self.quantizer, self.index = quantizer, flat
        if self.device.type == "cuda":
            if not has_gpu():
                raise ValueError(
                    "device must be 'cpu' with a FAISS without GPU; got 'cuda': pip install "
                    "'saap[gpu]'"
                )
            self.resources = faiss.StandardGpuResources()
            options = faiss.GpuIndexIVFFlatConfig()
            options.device = self.device.index or 0
            self.index = faiss.GpuIndexIVFFlat(self.resources, flat, options)

    @property
    def ntotal(self) -> int:
        return self.index.ntotal

    def add(self, x: Float[Tensor, "n D"], ids: Int[Tensor, " n"], buckets: Int[Tensor, " n"]):
        """Add vectors to the buckets given; `ids` are what `search` returns."""
        if len(x) == 0:
            return
        x, ids, buckets = x.float().contiguous(), ids.long().contiguous(), buckets.long()
        buckets = buckets.contiguous()
        with self._stream():
            self.index.add_core(len(x), _floats(x), _labels(ids), _labels(buckets))

    def search(
        self, q: Float[Tensor, "n D"], k: int, buckets: Int[Tensor, "n nprobe"]
    ) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
        """Best k inner products within each query's buckets; id -1 where there are fewer."""
        check_gpu_limits(self.device, k=k, nprobe=buckets.shape[1])
        q, buckets = q.float().contiguous(), buckets.long().contiguous()
        scores = q.new_empty(len(q), k)
        ids = buckets.new_empty(len(q), k)
        if len(q) == 0:
            return scores, ids
        centroid_scores = torch.zeros_like(buckets, dtype=torch.float32)  # None is a segfault
        self.index.nprobe = buckets.shape[1]
        with self._stream():
            self.index.search_preassigned_c(
                len(q),
                _floats(q),
                k,
                _labels(buckets),
                _floats(centroid_scores),
                _floats(scores),
                _labels(ids),
                False,
            )
        return scores, ids

    def serialized(self) -> bytes:
        """The plain FAISS index as FAISS's own file format."""
        faiss = load_faiss()
        on_cpu = self.index
        if self.device.type == "cuda":
            on_cpu = faiss.index_gpu_to_cpu(self.index)
        return faiss.serialize_index(on_cpu).tobytes()

    def _stream(self):
        if self.device.type != "cuda":
            return torch.no_grad()
        faiss = load_faiss()
        stream = torch.cuda.current_stream(self.device).cuda_stream
        self.resources.setDefaultStream(
            self.device.index or 0, faiss.cast_integer_to_cudastream_t(stream)
        )
        return torch.cuda.device(self.device)


def check_gpu_limits(device: torch.device, **values: int) -> None:
    """Raise ValueError for k or nprobe beyond what FAISS's GPU classes take."""
    for name, value in values.items():
        if device.type == "cuda" and value > GPU_LIMIT:
            raise ValueError(f"{name} must be at most {GPU_LIMIT} for FAISS on a GPU; got {value}")


def _floats(x: Tensor):
    return load_faiss().cast_integer_to_float_ptr(x.data_ptr())


def _labels(x: Tensor):
    return load_faiss().cast_integer_to_idx_t_ptr(x.data_ptr())


def read_inverted_file(
    data: bytes,
) -> tuple[Float[Tensor, "nlist D"], Float[Tensor, "n D"], Int[Tensor, " n"], Int[Tensor, " n"]]:
    """`centroids, vectors, ids, buckets` of a serialised `IndexIVFFlat`.

    FAISS's reader trusts its input: only for bytes that the caller vouches for. Raises ValueError
    for another kind of index.
    """
    faiss = load_faiss()
    try:
        index = faiss.deserialize_index(np.frombuffer(data, dtype=np.uint8))
    except RuntimeError as error:
        raise ValueError(f"not a FAISS index file ({str(error).splitlines()[0]})") from error
    if type(index) is not faiss.IndexIVFFlat:  # others lay their vectors out otherwise
        raise ValueError(f"a FAISS index must be an IndexIVFFlat; got {type(index).__name__}")
    if index.metric_type != faiss.METRIC_INNER_PRODUCT:
        raise ValueError(f"metric_type must be METRIC_INNER_PRODUCT; got {index.metric_type}")
    centroids = index.quantizer.reconstruct_n(0, index.nlist)
    vectors, ids, buckets = [], [], []
    for number in range(index.nlist):
        size = index.invlists.list_size(number)
        if size == 0:
            continue
        codes = faiss.rev_swig_ptr(index.invlists.get_codes(number), size * index.code_size)
        vectors.append(codes.view("float32").reshape(size, index.d).copy())
        ids.append(faiss.rev_swig_ptr(index.invlists.get_ids(number), size).copy())
        buckets.append(np.full(size, number))
    empty = [np.empty((0, index.d), np.float32)], [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    vectors, ids, buckets = (vectors, ids, buckets) if ids else empty
    return tuple(
        torch.from_numpy(a)
        for a in (centroids, *(np.concatenate(parts) for parts in (vectors, ids, buckets)))
    )


def flat_search(
    keys: Float[Tensor, "n D"], q: Float[Tensor, "m D"], k: int
) -> tuple[Float[Tensor, "m k"], Int[Tensor, "m k"]]:
    """Exact `IndexFlatIP`: the k largest inner products, best first."""
    index = load_faiss().IndexFlatIP(keys.shape[1])
    index.add(as_array(keys))
    scores, ids = index.search(as_array(q), k)
    return torch.from_numpy(scores).to(q.device), torch.from_numpy(ids).to(q.device)


class Graph:
    """`IndexHNSWFlat` (inner product) of one head."""

    def __init__(self, keys: Float[Tensor, "n D"], *, neighbours: int, ef_construction: int):
        faiss = load_faiss()
        self.index = faiss.IndexHNSWFlat(keys.shape[1], neighbours, faiss.METRIC_INNER_PRODUCT)
        self.index.hnsw.efConstruction = ef_construction
        self.index.add(as_array(keys))

    def search(
        self, q: Float[Tensor, "m D"], k: int, *, ef: int
    ) -> tuple[Float[Tensor, "m k"], Int[Tensor, "m k"], int]:
        """Scores and ids (-1 where the graph found fewer), and how many keys were compared."""
        faiss = load_faiss()
        faiss.cvar.hnsw_stats.reset()
        options = faiss.SearchParametersHNSW(efSearch=ef)
        scores, ids = self.index.search(as_array(q), k, params=options)
        found = torch.from_numpy(scores).to(q.device), torch.from_numpy(ids).to(q.device)
        return *found, int(faiss.cvar.hnsw_stats.ndis)


def product_quantize(
    keys: Float[Tensor, "n D"], *, parts: int, bits: int, n_iter: int, seed: int
) -> Float[Tensor, "n D"]:
    """Keys as a `ProductQuantizer` decodes them, which asymmetric distances are computed from."""
    faiss = load_faiss()
    quantizer = faiss.ProductQuantizer(keys.shape[1], parts, bits)
    quantizer.cp.niter, quantizer.cp.seed = n_iter, seed
    quantizer.cp.min_points_per_centroid = 1
    x = as_array(keys)
    quantizer.train(x)
    return torch.from_numpy(quantizer.decode(quantizer.compute_codes(x))).to(keys.device)
