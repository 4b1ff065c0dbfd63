"""Pareto fronts: what is found, lost or answered against what is visited or read."""

from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator, PercentFormatter

from ..units import told_search
from .plots import DASHES, INK, STYLE, WIDTH, color, marker, save

BOUNDS = ("oracle", "oracle-tokens", "random", "dense")
"""No methods: what they know or forget is nothing that could be built."""
LABEL_INCHES = 0.2


@dataclass(frozen=True)
class Front:
    """One picture: two columns of scores of a task; `better` is +1 where more of `y` is better."""

    x: str
    y: str
    better: int
    title: str
    y_label: str


FRONTS = {
    "recall": Front("selectivity", "recall_middle", 1, "Recall against share of the cache visited",
                    "attention mass of the middle that is found"),
    "recall_bytes": Front("bytes_read", "recall_middle", 1, "Recall against bytes read",
                          "attention mass of the middle that is found"),
    "error_bytes": Front("bytes_read", "output_error", -1, "Output error against bytes read",
                         "relative error of the attention output"),
    "accuracy": Front("selectivity", "accuracy", 1, "Answers against share of the cache visited",
                      "share of the answers that are right"),
}  # fmt: skip
X_LABELS = {
    "selectivity": "share of the cache that is visited (sinks and window included)",
    "bytes_read": "kB read per layer and step (router and centroids included)",
}


def curves(scores: list[dict], x: str, y: str) -> dict[str, np.ndarray]:
    """Points `[n, 2]` of each method but dense, sorted by x."""
    found: dict[str, list] = {}
    for s in scores:
        if s.get(y) is not None and s["method"] != "dense":
            name = f"{s['method']} {told_search(s['budget'])}".strip()
            found.setdefault(name, []).append((s[x], s[y]))
    return {m: np.array(sorted(points)) for m, points in found.items()}


def front_of(found: dict[str, np.ndarray], better: int) -> np.ndarray:
    """Points `[n, 2]` that no other point of a method beats in both columns, sorted by x."""
    points = [p for name, own in found.items() if name.split(" ")[0] not in BOUNDS for p in own]
    front, best = [], -np.inf
    for x, y in sorted(points, key=lambda p: (p[0], -better * p[1])):
        if better * y > best:
            front.append((x, y))
            best = better * y
    return np.array(front).reshape(-1, 2)


def draw_front(scores: list[dict], front: Front, where: str, path: Path) -> Path | None:
    """None where no method was searched at more than one budget: there is no line to draw."""
    found = curves(scores, front.x, front.y)
    if max((len(points) for points in found.values()), default=0) < 2:
        return None
    if front.x == "bytes_read":
        found = {name: points * (1e-3, 1) for name, points in found.items()}
    height = max(4.4, LABEL_INCHES * len(found) + 1.2)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(WIDTH, height))
        best = front_of(found, front.better)
        axes.plot(*best.T, color="#f2c14e", linewidth=9, alpha=0.35, solid_capstyle="round")
        for name, points in found.items():
            ours = name.split(" ")[0] == "saap"
            axes.plot(
                points[:, 0], points[:, 1], color=color(name), marker=marker(name), markersize=4.5,
                dashes=DASHES.get(name, (1, 0)), linewidth=2.6 if ours else 1.5,
                zorder=4 if ours else 2,
            )  # fmt: skip
        set_axes(axes, front)
        dense = [s[front.y] for s in scores if s["method"] == "dense" and s.get(front.y)]
        ends = [(points[-1, 0], points[-1, 1], name) for name, points in found.items()]
        if front.y == "accuracy" and dense:
            axes.axhline(dense[0], color=color("dense"), linewidth=1.2, dashes=(6, 3))
            ends.append((axes.get_xlim()[1], dense[0], "dense"))
        label_column(axes, ends)
        axes.set_title(f"{front.title}, {where}", loc="left", color=INK, fontsize=13)
        return save(figure, path)


def set_axes(axes, front: Front) -> None:
    axes.set_xlabel(X_LABELS[front.x])
    axes.set_ylabel(front.y_label)
    if front.x == "selectivity":
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    else:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}"))
        axes.xaxis.set_minor_locator(NullLocator())
    if front.y == "output_error":
        axes.set_ylim(bottom=0)
    else:
        axes.set_ylim(0, 1.02)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlim(*axes.get_xlim())


def label_column(axes, ends: list[tuple[float, float, str]]) -> None:
    """Names in one column at the right, in the order of the lines' ends, joined to them."""
    inverse = axes.transAxes.inverted()
    ends = sorted(ends, key=lambda end: axes.transData.transform(end[:2])[1])
    heights = [inverse.transform(axes.transData.transform(end[:2]))[1] for end in ends]
    height = axes.get_position().height * axes.figure.get_size_inches()[1]
    for (x, y, name), place in zip(ends, spread(heights, LABEL_INCHES / height), strict=True):
        axes.annotate(
            name, (x, y), xytext=(1.03, place), textcoords="axes fraction", va="center",
            color=color(name), fontsize=10, annotation_clip=False,
            fontweight="bold" if name == "saap" else "normal",
            arrowprops={"arrowstyle": "-", "color": color(name), "linewidth": 0.6, "alpha": 0.6,
                        "shrinkA": 1, "shrinkB": 3, "relpos": (0, 0.5)},
        )  # fmt: skip


def spread(heights: list[float], gap: float, top: float = 1.0) -> list[float]:
    """Ascending `heights` pushed apart to `gap`, and below `top` where they are too many."""
    places = list(heights)
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + gap)
    for i in range(len(places) - 1, -1, -1):
        ceiling = places[i + 1] - gap if i + 1 < len(places) else max(top, heights[-1])
        places[i] = min(places[i], ceiling)
    return places
