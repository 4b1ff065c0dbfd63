"""Pictures of scores, one function each; PNG files that stand alone."""

import io
import zlib
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.ticker import PercentFormatter

from saap.index.tensor_files import write_atomically

from ..units import share_of, told_search

# A family shares a marker; within it colours are told apart.
FAMILIES = {
    "o": {"blend": "#b23a6b", "mlp": "#b5651d", "linear": "#d99a1c", "kmeans": "#00798c",
          "kmeans-rope": "#5a9a74", "kmeans-cells": "#4f6df5", "moments": "#8e44ad",
          "kmeans-online": "#2a9d8f", "oracle": "#2e4057", "random": "#8a8a8a",
          "dense": "#2e4057"},
    "s": {"quest": "#c2559d", "mean-pages": "#7a8450", "moments-pages": "#5e548e",
          "streaming": "#8d6a9f"},
    "^": {"oracle-tokens": "#5c6b7a", "flat": "#9c6644", "hnsw": "#3d7ea6", "pq": "#a4508b",
          "saap": "#d1495b",
          "lsh": "#588157"},
}  # fmt: skip
COLORS = {name: shade for family in FAMILIES.values() for name, shade in family.items()}
OTHERS = ("#7a8450", "#a4508b", "#3d5a80", "#9c6644", "#5e548e", "#588157")
DASHES = {"oracle": (4, 2), "oracle-tokens": (4, 2), "random": (1, 2)}
STYLE = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "axes.axisbelow": True,
    "axes.edgecolor": "#777777",
    "figure.dpi": 110,
    "savefig.dpi": 160,
    "svg.hashsalt": "saap",
    "text.parse_math": False,  # names are text
}
INK = "#222222"
WIDTH = 6.4
PANELS, MAP_INCHES = 3, 1.8  # maps beside each other, and the width of each
LEAST_MASS = 0.005  # where there is so little to find, a share of it says nothing
FAINT_MASS = 0.05  # share of attention in the middle under which a head cannot lose much


def base_name(method: str) -> str:
    return method.split("[")[0].split(" ")[0]


def marker(method: str) -> str:
    return next((m for m, own in FAMILIES.items() if base_name(method) in own), "D")


def color(method: str) -> str:
    """A method's own; variants have their method's, any other one of a few, by its name."""
    base = base_name(method)
    return COLORS.get(base) or OTHERS[zlib.crc32(base.encode()) % len(OTHERS)]


def save(figure, path: Path) -> Path:
    """Write a picture whole or not at all; ValueError when it cannot be written."""
    kind = picture_format(path)
    metadata = {"Software": None} if kind == "png" else None
    content = io.BytesIO()
    try:
        figure.savefig(
            content, format=kind, bbox_inches="tight", facecolor="white", metadata=metadata
        )
    finally:
        plt.close(figure)
    write_atomically(path, content.getvalue())
    return path


def picture_format(path: Path) -> str:
    """The kind that the name asks for: PNG without a suffix; ValueError for what is no picture."""
    kind = path.suffix[1:].lower() or "png"
    known = FigureCanvasAgg.get_supported_filetypes()
    if kind not in known:
        raise ValueError(f"{path}: a picture must end in one of {', '.join(known)}; got {kind}")
    return kind


def answer_bars(scores: list[dict], path: Path) -> Path:
    """Pass-key accuracy of each method at one context."""
    ordered = sorted(scores, key=lambda s: (s["method"] != "dense", -s["accuracy"]))
    own = {s["method"]: s for s in ordered}
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(WIDTH, 0.36 * len(own) + 1.4))
        for at, (method, score) in enumerate(own.items()):
            axes.barh(-at, score["accuracy"], height=0.72, color=color(method))
            axes.annotate(
                f"{score['accuracy']:.0%}", (score["accuracy"], -at), xytext=(5, 0),
                textcoords="offset points", va="center", color=INK, fontsize=10,
            )  # fmt: skip
        axes.set_yticks([-i for i in range(len(own))], list(own))
        axes.set_xlim(0, 1.08)
        axes.grid(axis="y", visible=False)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_title(f"Pass keys answered{told_visited(scores)}", loc="left", color=INK,
                       fontsize=13)  # fmt: skip
        return save(figure, path)


def told_visited(scores: list[dict]) -> str:
    visited = [s["selectivity"] for s in scores if s["method"] != "dense"]
    return f", visiting {np.mean(visited):.1%} of the cache" if visited else ""


def answer_maps(scores: list[dict], path: Path) -> Path:
    """Share of answers that are right: methods down, contexts across, a panel a task."""
    tasks = list(dict.fromkeys(s["task"] for s in scores))
    contexts = sorted({s["context"] for s in scores})
    found = {(s["task"], s["method"], s["context"]): s["accuracy"] for s in scores}
    methods = list(dict.fromkeys(s["method"] for s in scores))
    means = {m: np.mean([v for (_, own, _), v in found.items() if own == m]) for m in methods}
    methods.sort(key=lambda m: (m != "dense", -means[m]))
    columns = min(PANELS, len(tasks))
    rows = -(-len(tasks) // columns)
    with plt.rc_context({**STYLE, "axes.grid": False}):
        size = (WIDTH, rows * (0.24 * len(methods) + 0.5) + 0.8)
        figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, sharex=True,
                                    sharey=True, layout="constrained")  # fmt: skip
        for axis in axes.flat[len(tasks) :]:
            axis.set_visible(False)
        for axis, task in zip(axes.flat, tasks, strict=False):
            values = np.array([[found.get((task, m, c), np.nan) for c in contexts]
                               for m in methods])  # fmt: skip
            axis.imshow(values, cmap="YlGnBu", vmin=0, vmax=1, aspect="auto")
            axis.set_title(task, fontsize=10, color=INK)
            axis.set_xticks(range(len(contexts)), [thousands(c) for c in contexts])
            axis.set_yticks(range(len(methods)), methods)
            axis.tick_params(length=0, labelsize=9)
            write_cells(axis, values)
        figure.supxlabel("tokens of context", fontsize=10)
        figure.suptitle(f"Answers found (%){told_visited(scores)}", fontsize=13, color=INK, x=0.02,
                        ha="left")  # fmt: skip
        return save(figure, path)


def thousands(value: float, _=None) -> str:
    return f"{value / 1024:g}k" if value >= 1024 and value % 1024 == 0 else f"{value:,.0f}"


def head_maps(
    scores: list[dict], context: int, budget: str, methods: list[str], path: Path
) -> Path | None:
    """Share of attention on the middle, and each method's recall, a layer and query head.

    None where the run holds no method at that share.
    """
    own = {
        s["method"]: s
        for s in scores
        if s["task"] == "attention"
        and s["context"] == context
        and not told_search(s["budget"])
        and share_of(s["budget"]) == float(budget)
    }
    chosen = [m for m in methods if m in own] or [m for m in own if m != "dense"][:3]
    if not own:
        return None
    mass = np.array(next(iter(own.values()))["head_middle_mass"])
    panels = [("share of attention\non the middle", mass, "Greys")]
    nothing = mass < LEAST_MASS
    panels += [
        (f"recall, {m}", np.where(nothing, np.nan, own[m]["head_recall"]), "YlGnBu")
        for m in chosen
    ]
    with plt.rc_context({**STYLE, "axes.grid": False}):
        layers, heads = mass.shape
        rows = -(-len(panels) // PANELS)
        cell = min(0.42, MAP_INCHES / heads)
        size = (WIDTH, (max(1.0, cell * layers) + 0.75) * rows + 0.3)
        figure, axes = plt.subplots(rows, PANELS, figsize=size, squeeze=False, sharex=True,
                                    sharey=True, layout="constrained")  # fmt: skip
        for axis in axes.flat[len(panels) :]:
            axis.set_visible(False)
        for axis, (title, values, cmap) in zip(axes.flat, panels, strict=False):
            axis.imshow(values, cmap=cmap, vmin=0, vmax=1, aspect="auto")
            axis.set_title(title, fontsize=10, color=INK)
            axis.set_xticks(range(0, heads, -(-heads // 8)))
            axis.set_yticks(range(0, layers, -(-layers // 8)))
            axis.tick_params(length=0, labelsize=9)
            if heads <= 8 and layers <= 16:
                write_cells(axis, values, mass < FAINT_MASS if cmap != "Greys" else None)
        figure.supylabel("layer", fontsize=10)
        figure.supxlabel("query head", fontsize=10)
        return save(figure, path)


def write_cells(axis, values: np.ndarray, faint: np.ndarray | None = None) -> None:
    """Percents in the cells of a map, pale where `faint`."""
    axis.spines[:].set_visible(False)
    for place, value in np.ndenumerate(values):
        if np.isfinite(value):
            axis.text(
                *place[::-1], f"{100 * value:.0f}", ha="center", va="center", fontsize=8.5,
                color="white" if value > 0.55 else INK,
                alpha=0.5 if faint is not None and faint[place] else 1.0,
            )  # fmt: skip
