"""Index files: one safetensors file, mapped when opened; checked cheaply then, fully on demand.

The metadata holds a JSON header: format version, shape, options, the SHA-256 of each tensor, and
its own SHA-256. `load` reads the header and the bucket offsets alone: an altered header, a missing
or misshapen tensor, or a truncated file is refused; centroids, router and keys are read as they
are used.
`verify` reads all. There is no pickle in the format, and FAISS reads nothing but what the caller
vouches for.
"""

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from .faiss_backend import InvertedFile, read_inverted_file
from .ivf import AsymmetricIVF
from .routers import ROUTERS, CentroidRouter, Router
from .rows import BucketRows
from .tensor_files import (
    check_signed,
    check_table,
    header_digest,
    read,
    shape_and_dtype,
    write_atomically,
)

FORMAT = "saap.AsymmetricIVF"
FORMAT_VERSION = 1
DTYPES = {str(t).removeprefix("torch."): t for t in (torch.float32, torch.float16, torch.bfloat16)}


def save(index: AsymmetricIVF, path: str | Path) -> None:
    """Merge the pending keys and write the index; an older file stays whole until that is done."""
    if not index.is_trained:
        raise ValueError("save before training: call train, or use from_trained")
    index.flush()
    tensors = {
        "vectors": index.vectors,
        "positions": index.positions,
        "offsets": index.offsets,
        "centroids": index.centroids,
    }
    if index.spill:
        tensors["second"] = index._rows.second
    name = next(n for n, kind in ROUTERS.items() if type(index.router) is kind)
    if name != "centroid":
        tensors |= {f"router.{part}": t for part, t in index.router.tensors().items()}
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    header = {
        "format_version": FORMAT_VERSION,
        "d": index.d,
        "n_kv": index.n_kv,
        "nlist": index.nlist,
        "ntotal": index.ntotal,
        "spill": index.spill,
        "flush_every": index.flush_every,
        "dtype": str(index.dtype).removeprefix("torch."),
        "router": name,
        "tensors": {
            name: {**shape_and_dtype(t), "sha256": tensor_digest(t)} for name, t in tensors.items()
        },
    }
    header["sha256"] = header_digest(header)

    def write(temporary: str) -> None:
        save_file(tensors, temporary, metadata={FORMAT: json.dumps(header, sort_keys=True)})

    write_atomically(Path(path), write)


def load(path: str | Path, *, device: str | torch.device = "cpu") -> AsymmetricIVF:
    """Open a file that `save` wrote. Raises ValueError for any other and for altered ones."""
    path = Path(path)
    header, tensors = open_tensors(path)
    offsets, n = tensors["offsets"], header["ntotal"]
    if (
        (offsets[:, 0] != 0).any()
        or (offsets[:, -1] != n).any()
        or (offsets.diff(dim=1) < 0).any()
    ):
        raise ValueError(f"{path}: its bucket offsets do not lead from 0 to {n}: it was altered")
    tensors = {name: t.to(device) for name, t in tensors.items()}
    # Nothing but offsets is read here: `from_trained` would look through all centroids.
    index = AsymmetricIVF(
        header["d"], header["n_kv"], header["nlist"], spill=header["spill"],
        flush_every=header["flush_every"], dtype=DTYPES[header["dtype"]], device=device,
    )  # fmt: skip
    index.centroids = tensors["centroids"]
    index.router = router_of(path, header, tensors)
    index._rows = BucketRows.from_sorted(
        tensors["vectors"], tensors["positions"], offsets.to(device), tensors.get("second")
    )
    return index


def router_of(path: Path, header: dict, tensors: dict[str, Tensor]) -> Router:
    parts = {k.removeprefix("router."): t for k, t in tensors.items() if k.startswith("router.")}
    if not parts:
        return CentroidRouter(tensors["centroids"])
    try:
        router = ROUTERS[header["router"]](**parts)
    except (TypeError, IndexError) as error:
        raise ValueError(f"{path}: router {header['router']!r}: {error}") from error
    if router.nlist != header["nlist"]:
        raise ValueError(f"{path}: router has nlist={router.nlist}, the index {header['nlist']}")
    return router


def verify(path: str | Path) -> None:
    """Read a whole index file; ValueError names the first tensor that is not as it was saved."""
    header, tensors = open_tensors(Path(path))
    for name, tensor in tensors.items():
        if tensor_digest(tensor) != header["tensors"][name]["sha256"]:
            raise ValueError(f"{path}: {name} does not fit its checksum: the file was altered")


def open_tensors(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """The checked header and the mapped tensors of an index file."""
    header, tensors = read(path, FORMAT, FORMAT_VERSION, "AsymmetricIVF.save")
    check_signed(path, header)
    check_options(path, header)
    check_table(path, header, tensors)
    return header, tensors


def check_options(path: Path, header: dict) -> None:
    """ValueError where the options of a header are none, or do not fit the tensors it lists."""
    try:
        n_kv, d, nlist, n = (header[name] for name in ("n_kv", "d", "nlist", "ntotal"))
        listed = {name: (t["shape"], t["dtype"]) for name, t in header["tensors"].items()}
        implied = {
            "vectors": ([n_kv, n, d], str(DTYPES[header["dtype"]])),
            "positions": ([n_kv, n], "torch.int64"),
            "offsets": ([n_kv, nlist + 1], "torch.int32"),
            "centroids": ([n_kv, nlist, d], "torch.float32"),
        }
        if header["spill"]:
            implied["second"] = ([n_kv, n], "torch.int32")
        parts = {name for name in listed if name.startswith("router.")}
        if header["router"] not in ROUTERS or (header["router"] == "centroid") == bool(parts):
            raise ValueError(f"{path}: router {header['router']!r} with tensors {sorted(parts)}")
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: its header lacks or misstates {error}") from error
    for name, own in implied.items():
        if listed.get(name) != own:
            raise ValueError(f"{path}: {name} is {listed.get(name)}: its options say {own}")


def tensor_digest(tensor: Tensor) -> str:
    described = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    if tensor.numel():
        described.update(tensor.contiguous().view(torch.uint8).numpy())
    return described.hexdigest()


def to_faiss(index: AsymmetricIVF, path: str | Path, head: int) -> None:
    """One KV head as a plain FAISS `IndexIVFFlat` file, ids the positions, for FAISS users.

    FAISS visits the buckets of the nearest centroids unless it is given others: use
    `search_preassigned` with the buckets of `route`. A spilled key is written in its best bucket.
    """
    if not 0 <= head < index.n_kv:
        raise ValueError(f"head={head}: accepted are 0 to {index.n_kv - 1}")
    index.flush()
    inverted = InvertedFile(index.centroids[head])
    inverted.add(index.vectors[head], index.positions[head], index._rows.buckets[head])
    write_atomically(Path(path), inverted.serialized())


def from_faiss(
    paths: list[str | Path], *, trusted: bool = False, flush_every: int = 1024
) -> AsymmetricIVF:
    """An index from one `IndexIVFFlat` file a KV head, with the same ids in each.

    FAISS's reader can be made to run over memory by a crafted file: `trusted=True` says that these
    come from a source you vouch for. Raises ValueError otherwise, and for files that do not fit.
    """
    if not trusted:
        raise ValueError(
            "trusted=False: FAISS files are only read with trusted=True, for files you vouch for"
        )
    heads = []
    for path in paths:
        if not Path(path).is_file():
            raise ValueError(f"{path}: no such file; accepted is a FAISS IndexIVFFlat file")
        heads.append(read_inverted_file(Path(path).read_bytes()))
    if not heads:
        raise ValueError("paths is empty: accepted is one file a KV head")
    first = heads[0]
    for path, (centroids, vectors, ids, _) in zip(paths, heads, strict=True):
        same = torch.equal(ids.sort().values, first[2].sort().values)
        if centroids.shape != first[0].shape or vectors.shape != first[1].shape or not same:
            raise ValueError(
                f"{path}: its nlist, dimension or ids differ from those of {paths[0]}"
            )
    ids = first[2].sort().values
    if len(ids.unique()) < len(ids) or (len(ids) and int(ids[0]) < 0):
        raise ValueError(f"{paths[0]}: accepted are ids from 0, each once")
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
