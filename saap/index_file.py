"""What the file of a `TrainedIndex` may hold: read, and checked against its header in full.

Shapes, dtypes and names of all tensors follow from the header, all numbers are finite, and every
checksum is computed: these files are small.
"""

from pathlib import Path

from torch import Tensor

from saap.index import tensor_files
from saap.index.file_fields import (
    FLOAT32,
    MOST_LISTS,
    Fields,
    Layout,
    check_finite,
    check_layout,
    router_layout,
)
from saap.index.routers import TRAINABLE

FORMAT = tensor_files.Format("saap.TrainedIndex", 3, "`saap train`")
LAYER_FORMAT = tensor_files.Format("saap.TrainedLayer", 1, "`saap train` (its work folder)")
MOST_SEGMENTS = 4096
LEARNED = tuple(name for name in TRAINABLE if name != "centroid")
OF_FILE = ("format_version", "tensors", "sha256")


def read(path: Path, kind: tensor_files.Format) -> tuple[dict, dict[str, Tensor]]:
    """Metadata and tensors of an index, or of one trained layer. ValueError for anything else."""
    header, tensors = tensor_files.read(path, kind)
    layout = layout_of(path, header, tensors, whole=kind == FORMAT)
    check_layout(path, tensors, layout)
    tensor_files.verify(path, header, tensors)
    check_finite(path, tensors)
    return {k: v for k, v in header.items() if k not in OF_FILE}, tensors


def layout_of(path: Path, header: dict, tensors: dict[str, Tensor], *, whole: bool) -> Layout:
    """The tensors that the header, once checked, asks for. Layers that were not trained have none.

    `whole`: an index, which has more to say than one layer of a work folder.
    """
    fields = Fields(path, header)
    model = fields.section("model")
    n_layers, n_kv, dim = (
        model.integer(n, 1, 2**16) for n in ("num_layers", "num_kv_heads", "head_dim")
    )
    n_heads = model.integer("num_heads", n_kv, 2**16)
    if n_heads % n_kv:
        raise model.wrong("num_heads", f"a multiple of num_kv_heads={n_kv}")
    nlist = fields.integer("nlist", 1, MOST_LISTS)
    n_segments = fields.integer("n_segments", 1, MOST_SEGMENTS)
    fields.flag("interleaved")
    fields.numbers("sm_scale", n_layers, positive=True)
    if whole:
        router = check_description(fields, model, n_layers)
    layout: Layout = {}
    for number in range(n_layers):
        prefix = f"layers.{number}."
        own = {name.removeprefix(prefix) for name in tensors if name.startswith(prefix)}
        if not own:
            continue
        layout[prefix + "centroids"] = ((n_kv, nlist, dim), FLOAT32)
        if "centroids_rope" in own:
            layout[prefix + "centroids_rope"] = ((n_kv, nlist, dim), FLOAT32)
        if "inv_freq" in own:
            pairs = tensors[prefix + "inv_freq"]
            pairs = min(len(pairs) if pairs.ndim == 1 else 0, dim // 2)
            layout[prefix + "inv_freq"] = ((pairs,), FLOAT32)
        if "key_scale" in own or ("inv_freq" in own and n_segments > 1):
            layout[prefix + "key_scale"] = ((n_kv, nlist), FLOAT32)
        if any(name.startswith("coordinates.") for name in own):
            start = prefix + "coordinates."
            layout |= {
                start + "of_keys": ((1, n_kv, dim, dim), FLOAT32),
                start + "of_queries": ((1, n_kv, dim, dim), FLOAT32),
                start + "mean": ((1, n_kv, dim), FLOAT32),
                start + "importance": ((1, n_kv, dim), FLOAT32),
            }
        for name in LEARNED:
            start = f"{prefix}{name}."
            if (whole and name == router) or any(n.startswith(name + ".") for n in own):
                layout |= router_layout(
                    name, tensors, prefix=start, n_heads=n_heads, nlist=nlist, dim=dim
                )
    if not layout:
        raise ValueError(f"{path}: at least one layer must be trained; got none")
    return layout


def check_description(fields: Fields, model: Fields, n_layers: int) -> str:
    """What an index says beside shapes; returns the name of its default router."""
    for name in ("n_sink", "window"):
        fields.integer(name)
    if "context" in fields.values:
        fields.integer("context", 1)
    if "attention_norms" in model.values:
        model.numbers("attention_norms", n_layers)
    if "recall" in fields.values:
        recall = fields.section("recall")
        for name in recall.values:
            if name == "nprobe":
                recall.integer(name, 1)
                continue
            rows = dict(enumerate(recall.items(name, n_layers)))
            for number in rows:
                of_layer = Fields(fields.path, {f"layer {number}": rows[number]}, "its recall")
                of_layer.numbers(f"layer {number}", model.values["num_heads"])
    return fields.text("router", TRAINABLE)
