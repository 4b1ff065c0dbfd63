"""Save and load an `AsymmetricIVF`: a file is mapped and cheaply checked when it is opened.

`load` reads the header, bucket offsets, centroids and router, and the integers that must stay in
range. It refuses an altered header, a missing or misshapen tensor, lists out of range and a
truncated file. Keys are read as they are used; `verify` reads and checks everything
(`saap.index.tensor_files`). FAISS reads only files that the caller vouches for.
"""

from pathlib import Path

import torch
from torch import Tensor

from . import checks, tensor_files
from .checks import DTYPES as FLOATS
from .faiss_backend import InvertedFile, read_inverted_file
from .file_fields import (
    FLOAT32,
    MOST_LISTS,
    Fields,
    check_finite,
    check_layout,
    check_range,
    router_layout,
)
from .ivf import AsymmetricIVF
from .routers import ROUTERS, CentroidRouter, Router
from .sorted_rows import SortedRows
from .tensor_files import write_atomically

FORMAT = tensor_files.Format("saap.AsymmetricIVF", 2, "AsymmetricIVF.save")
DTYPES = {str(t).removeprefix("torch."): t for t in FLOATS}


def save(index: AsymmetricIVF, path: str | Path) -> None:
    """Merge the pending keys and write the index; an older file stays whole until that is done."""
    if not index.is_trained:
        raise ValueError(
            "save must come after training; got an untrained index: call train, or use "
            "from_trained"
        )
    index.flush()
    name = next((n for n, kind in ROUTERS.items() if type(index.router) is kind), None)
    if name is None:
        raise ValueError(
            f"the router must be one of {', '.join(ROUTERS)} to be saved; got "
            f"{type(index.router).__name__}"
        )
    tensors = {
        "vectors": index.vectors,
        "positions": index.positions,
        "offsets": index.offsets,
        "centroids": index.centroids,
    }
    if index.spill:
        tensors["second"] = index._rows.second
    if name != "centroid":
        tensors |= {f"router.{part}": t for part, t in index.router.tensors().items()}
    header = {
        "d": index.d,
        "n_kv": index.n_kv,
        "nlist": index.nlist,
        "ntotal": index.ntotal,
        "spill": index.spill,
        "flush_every": index.flush_every,
        "dtype": str(index.dtype).removeprefix("torch."),
        "router": name,
        "n_heads": index.router.n_heads or 0,
    }
    tensor_files.write(path, FORMAT, header, tensors)


def load(path: str | Path, *, device: str | torch.device = "cpu") -> AsymmetricIVF:
    """Open a file that `save` wrote. Raises ValueError for any other and for altered ones."""
    header, tensors = open_tensors(Path(path))
    tensors = {name: t.to(device) for name, t in tensors.items()}
    # No key is read here: `from_trained` and `add` would look through all.
    index = AsymmetricIVF(
        header["d"], header["n_kv"], header["nlist"], spill=header["spill"],
        flush_every=header["flush_every"], dtype=DTYPES[header["dtype"]], device=device,
    )  # fmt: skip
    index.centroids = tensors["centroids"]
    index.router = router_of(header, tensors)
    index._rows = SortedRows(
        tensors["vectors"], tensors["positions"], tensors["offsets"], tensors.get("second")
    )
    return index


def router_of(header: dict, tensors: dict[str, Tensor]) -> Router:
    if header["router"] == "centroid":
        return CentroidRouter(tensors["centroids"])
    parts = {k.removeprefix("router."): t for k, t in tensors.items() if k.startswith("router.")}
    return ROUTERS[header["router"]](**parts)


def verify(path: str | Path) -> None:
    """Read a whole index file; a ValueError names the first tensor that has changed."""
    header, tensors = open_tensors(Path(path))
    tensor_files.verify(path, header, tensors)
    check_finite(path, tensors)
    in_order = tensors["positions"].sort(dim=1).values
    if (in_order.diff(dim=1) == 0).any() or (in_order != in_order[:1]).any():
        raise ValueError(
            f"{path}: positions must occur once each and be the same in all heads; got others"
        )


def open_tensors(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """The checked header and the mapped tensors of an index file."""
    header, tensors = tensor_files.read(path, FORMAT)
    fields = Fields(path, header)
    nlist = fields.integer("nlist", 2 if fields.flag("spill") else 1, MOST_LISTS)
    n_kv, d = (fields.integer(name, 1) for name in ("n_kv", "d"))
    n, n_heads = fields.integer("ntotal", 0, 2**31 - 1), fields.integer("n_heads")
    fields.integer("flush_every", 1)
    dtype, router = fields.text("dtype", DTYPES), fields.text("router", ROUTERS)
    layout = {
        "vectors": ((n_kv, n, d), (DTYPES[dtype],)),
        "positions": ((n_kv, n), (torch.int64,)),
        "offsets": ((n_kv, nlist + 1), (torch.int32,)),
        "centroids": ((n_kv, nlist, d), FLOAT32),
    }
    if header["spill"]:
        layout["second"] = ((n_kv, n), (torch.int32,))
    if router != "centroid":
        if not n_heads or n_heads % n_kv:
            raise fields.wrong("n_heads", f"a multiple of n_kv={n_kv}")
        layout |= router_layout(
            router, tensors, prefix="router.", n_heads=n_heads, nlist=nlist, dim=d, dtypes=FLOATS
        )
    check_layout(path, tensors, layout)
    check_finite(path, {k: t for k, t in tensors.items() if k != "vectors"})
    offsets = tensors["offsets"]
    if (offsets[:, 0] != 0).any() or (offsets[:, -1] != n).any() or (offsets.diff() < 0).any():
        raise ValueError(
            f"{path}: its bucket offsets must ascend from 0 to {n}; got others: it was altered"
        )
    check_range(path, "positions", tensors["positions"], 0, checks.MOST_POSITION)
    if header["spill"]:
        check_range(path, "second", tensors["second"], 0, nlist - 1)
    return header, tensors


def to_faiss(index: AsymmetricIVF, path: str | Path, head: int) -> None:
    """Write one KV head as a plain FAISS `IndexIVFFlat` file, with the positions as ids.

    FAISS visits the buckets of the nearest centroids unless it is given others: use
    `search_preassigned` with the buckets of `route`. A spilled key is written in its best bucket.
    """
    if not index.is_trained:
        raise ValueError("an index must be trained to be written for FAISS; got one that is not")
    if not 0 <= head < index.n_kv:
        raise ValueError(f"head must be in 0..{index.n_kv - 1}; got {head}")
    index.flush()
    inverted = InvertedFile(index.centroids[head])
    inverted.add(index.vectors[head], index.positions[head], index._rows.lists[head])
    write_atomically(Path(path), inverted.serialized())


def from_faiss(
    paths: list[str | Path], *, trusted: bool = False, flush_every: int = 1024
) -> AsymmetricIVF:
    """Make an index from one `IndexIVFFlat` file per KV head, with the same ids in each.

    FAISS's reader can be made to run over memory by a crafted file: `trusted=True` says that these
    come from a source you vouch for. Raises ValueError otherwise, and for files that do not fit.
    """
    if not trusted:
        raise ValueError(
            "trusted must be True to read FAISS files, which you then vouch for; got False"
        )
    heads = []
    for path in paths:
        if not Path(path).is_file():
            raise ValueError(f"{path}: must be a FAISS IndexIVFFlat file; got no such file")
        try:
            heads.append(read_inverted_file(Path(path).read_bytes()))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    if not heads:
        raise ValueError("paths must hold one file per KV head; got none")
    first = heads[0]
    for path, (centroids, vectors, ids, _) in zip(paths, heads, strict=True):
        same = torch.equal(ids.sort().values, first[2].sort().values)
        if centroids.shape != first[0].shape or vectors.shape != first[1].shape or not same:
            raise ValueError(
                f"{path}: its nlist, dimension and ids must be those of {paths[0]}; got others"
            )
    ids = first[2].sort().values
    if len(ids.unique()) < len(ids) or (len(ids) and int(ids[0]) < 0):
        raise ValueError(f"{paths[0]}: ids must be at least 0 and occur once each; got others")
    index = AsymmetricIVF.from_trained(
        torch.stack([centroids for centroids, *_ in heads]), flush_every=flush_every
    )
    orders = [own.argsort() for _, _, own, _ in heads]
    if len(ids):
        vectors = [own[o] for (_, own, _, _), o in zip(heads, orders, strict=True)]
        index._rows.append(torch.stack(vectors), ids)
        buckets = [own[o] for (_, _, _, own), o in zip(heads, orders, strict=True)]
        index._rows.merge(torch.stack(buckets), None)
    return index
