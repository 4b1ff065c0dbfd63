"""Pictures of scores, one function each; PNG files that stand alone."""

import zlib
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patheffects import withStroke
from matplotlib.ticker import PercentFormatter

from .units import share_of, told_search

COLORS = {
    "saap": "#d1495b",
    "linear": "#edae49",
    "kmeans": "#00798c",
    "kmeans-rope": "#66a182",
    "kmeans-cells": "#4f6df5",
    "mlp": "#b5651d",
    "streaming": "#8d6a9f",
    "oracle": "#2e4057",
    "random": "#9a9a9a",
    "dense": "#2e4057",
}
OTHERS = ("#7a8450", "#a4508b", "#3d5a80", "#9c6644", "#5e548e", "#588157")
DASHES = {"oracle": (4, 2), "random": (1, 2)}
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
}
INK = "#222222"


def color(method: str) -> str:
    """A method's own; variants have their method's, any other one of a few, by its name."""
    base = method.split("[")[0].split(" ")[0]
    return COLORS.get(base) or OTHERS[zlib.crc32(base.encode()) % len(OTHERS)]


def save(figure, path: Path) -> Path:
    figure.savefig(path, bbox_inches="tight", facecolor="white", metadata={"Software": None})
    plt.close(figure)
    return path


def curves(scores: list[dict], x: str, y: str, context: int) -> dict[str, np.ndarray]:
    """Points `[n, 2]` of each method, sorted by x."""
    found: dict[str, list] = {}
    for s in scores:
        if s["context"] == context and s.get(y) is not None and s["method"] != "dense":
            name = f"{s['method']} {told_search(s['budget'])}".strip()
            found.setdefault(name, []).append((s[x], s[y]))
    return {m: np.array(sorted(points)) for m, points in found.items()}


def label_ends(axes, ends: list[tuple[float, float, str]], spread: float) -> None:
    """Names at the right ends of lines, pushed apart so that they can be read."""
    ends = sorted(ends, key=lambda e: e[1])
    heights = [e[1] for e in ends]
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + spread)
    overshoot = heights[-1] - max(1.0, ends[-1][1])
    for i in range(len(heights) - 1, -1, -1):
        ceiling = (
            heights[i + 1] - spread if i + 1 < len(heights) else heights[i] - max(0, overshoot)
        )
        heights[i] = min(heights[i], ceiling)
    for (x, _, name), height in zip(ends, heights, strict=True):
        axes.annotate(
            name,
            (x, height),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            color=color(name),
            fontweight="bold" if name == "saap" else "normal",
            annotation_clip=False,
            # Where lines end at different places, a name may stand on another line.
            path_effects=[withStroke(linewidth=3, foreground="white")],
            zorder=5,
        )


def recall_curve(scores: list[dict], context: int, path: Path, *, against: str) -> Path:
    """Middle recall of every method against `selectivity` or `bytes_read`."""
    found = curves(
        [s for s in scores if s["task"] == "attention"], against, "recall_middle", context
    )
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7.2, 4.4))
        for name, points in found.items():
            axes.plot(
                points[:, 0] * (1 if against == "selectivity" else 1e-3),
                points[:, 1],
                color=color(name),
                marker="o",
                markersize=4.5,
                dashes=DASHES.get(name, (1, 0)),
                linewidth=2.6 if name == "saap" else 1.7,
                zorder=3 if name == "saap" else 2,
            )
        scale = 1 if against == "selectivity" else 1e-3
        label_ends(axes, [(p[-1, 0] * scale, p[-1, 1], n) for n, p in found.items()], 0.052)
        axes.set_ylim(0, 1)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_ylabel("attention mass of the middle that is found")
        if against == "selectivity":
            axes.xaxis.set_major_formatter(PercentFormatter(1.0))
            axes.set_xlabel("share of the cache that is visited (sinks and window included)")
        else:
            axes.set_xlabel("kB read a layer and step (router and centroids included)")
        what = "share of the cache visited" if against == "selectivity" else "bytes read"
        axes.set_title(
            f"Recall against {what}, {context:,} tokens", loc="left", color=INK, fontsize=13
        )
        return save(figure, path)


def answer_bars(scores: list[dict], path: Path) -> Path:
    """Pass-key accuracy of each method: one group of bars a context."""
    answers = [s for s in scores if s["task"] == "passkey"]
    contexts = sorted({s["context"] for s in answers})
    methods = list(dict.fromkeys(s["method"] for s in answers))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7.2, 0.36 * len(methods) * len(contexts) + 1.4))
        labels, at = [], 0.0
        for context in contexts:
            own = {s["method"]: s for s in answers if s["context"] == context}
            for method in methods:
                if method not in own:
                    continue
                value = own[method]["accuracy"]
                axes.barh(at, value, height=0.72, color=color(method))
                axes.annotate(
                    f"{value:.0%}",
                    (value, at),
                    xytext=(5, 0),
                    textcoords="offset points",
                    va="center",
                    color=INK,
                    fontsize=10,
                )
                labels.append((at, method if len(contexts) == 1 else f"{method}  {context:,}"))
                at -= 1
            at -= 0.6
        axes.set_yticks([p for p, _ in labels], [n for _, n in labels])
        axes.set_xlim(0, 1.08)
        axes.grid(axis="y", visible=False)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        visited = np.mean([s["selectivity"] for s in answers if s["method"] != "dense"])
        axes.set_title(
            f"Pass keys answered, visiting {visited:.1%} of the cache",
            loc="left",
            color=INK,
            fontsize=13,
        )
        return save(figure, path)


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
    panels += [(f"recall, {m}", np.array(own[m]["head_recall"]), "YlGnBu") for m in chosen]
    with plt.rc_context({**STYLE, "axes.grid": False}):
        layers, heads = mass.shape
        columns = min(3, len(panels))
        rows = -(-len(panels) // columns)
        width = max(2.5, 0.42 * heads + 0.6)
        figure, axes = plt.subplots(
            rows,
            columns,
            figsize=(width * columns, (0.42 * layers + 1.0) * rows),
            squeeze=False,
        )
        for axis in axes.flat[len(panels) :]:
            axis.set_visible(False)
        for axis, (title, values, cmap) in zip(axes.flat, panels, strict=False):
            axis.imshow(values, cmap=cmap, vmin=0, vmax=1, aspect="auto")
            axis.set_title(title, fontsize=10, color=INK)
            axis.set_xticks(range(heads))
            axis.set_yticks(range(layers))
            axis.tick_params(length=0, labelsize=9)
            if layers * heads <= 128:
                for (i, j), value in np.ndenumerate(values):
                    shade = "white" if value > 0.55 else INK
                    faint = 0.35 if mass[i, j] < 0.05 and title.startswith("recall") else 1.0
                    axis.text(
                        j,
                        i,
                        f"{100 * value:.0f}",
                        ha="center",
                        va="center",
                        fontsize=8,
                        color=shade,
                        alpha=faint,
                    )
        for axis in axes[:, 0]:
            axis.set_ylabel("layer", fontsize=9)
        for axis in axes[-1]:
            axis.set_xlabel("query head", fontsize=9)
        figure.tight_layout()
        return save(figure, path)
