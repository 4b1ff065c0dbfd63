"""Pictures of single questions: needle grids, latency, keys against queries, bucket sizes."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from .fronts import label_column
from .plots import INK, STYLE, WIDTH, color, marker, save, thousands, write_cells

N_DEPTHS = 5
KEYS, QUERIES = "#00798c", "#d1495b"


def needle_grid(scores: list[dict], task: str, methods: list[str], path: Path) -> Path:
    """Share of answers found: depth down, context across, a panel a method."""
    own = [s for s in scores if s["task"] == task and s["method"] in methods]
    contexts = sorted({s["context"] for s in own})
    methods = [m for m in methods if any(s["method"] == m for s in own)]
    columns = min(3 if len(contexts) <= 3 else 2, len(methods))
    rows = -(-len(methods) // columns)
    with plt.rc_context({**STYLE, "axes.grid": False}):
        figure, axes = plt.subplots(
            rows, columns, figsize=(WIDTH, 2.0 * rows + 0.9), squeeze=False, sharex=True,
            sharey=True, layout="constrained",
        )  # fmt: skip
        for axis in axes.flat[len(methods) :]:
            axis.set_visible(False)
        for axis, method in zip(axes.flat, methods, strict=False):
            values = depth_by_context([s for s in own if s["method"] == method], contexts)
            axis.imshow(values, cmap="YlGnBu", vmin=0, vmax=1, aspect="auto")
            axis.set_title(method, fontsize=10, color=INK)
            axis.set_xticks(range(len(contexts)), [thousands(c) for c in contexts])
            labels = [f"{100 * (i + 0.5) / N_DEPTHS:.0f} %" for i in range(N_DEPTHS)]
            axis.set_yticks(range(N_DEPTHS), labels)
            axis.tick_params(length=0, labelsize=9)
            write_cells(axis, values)
        figure.supylabel("depth of the answer", fontsize=10)
        figure.supxlabel("tokens of context", fontsize=10)
        figure.suptitle(f"{task}: answers found, %", fontsize=13, color=INK, x=0.02, ha="left")
        return save(figure, path)


def depth_by_context(own: list[dict], contexts: list[int]) -> np.ndarray:
    values = np.full((N_DEPTHS, len(contexts)), np.nan)
    for column, context in enumerate(contexts):
        pairs = [p for s in own if s["context"] == context for p in s["by_depth"]]
        for row in range(N_DEPTHS):
            inside = [a for d, a in pairs if min(int(d * N_DEPTHS), N_DEPTHS - 1) == row]
            if inside:
                values[row, column] = np.mean(inside)
    return values


def latency(scores: list[dict], budget_rows, path: Path) -> Path:
    """Draw microseconds per layer and step against context.

    With a single context, draw bars of the parts of a step.
    """
    own = [s for s in budget_rows if s["task"] == "speed"]
    contexts = sorted({s["context"] for s in own})
    with plt.rc_context(STYLE):
        if len(contexts) == 1:
            return save(parts_bars(own, contexts[0]), path)
        methods = {s["method"] for s in own}
        height = max(4.4, 0.2 * len(methods) + 1.2)
        figure, axes = plt.subplots(figsize=(WIDTH, height))
        lines: dict[str, list] = {}
        for s in own:
            if s["method"] != "dense":
                lines.setdefault(s["method"], []).append((s["context"], s["step_us"]))
        lines["dense"] = [
            (c, float(np.median([s["dense_us"] for s in own if s["context"] == c])))
            for c in contexts
        ]
        ends = []
        for name, points in lines.items():
            xs, ys = np.array(sorted(points)).T
            dashes = (4, 2) if name == "dense" else (1, 0)
            axes.plot(xs, ys, color=color(name), marker=marker(name), markersize=4.5,
                      dashes=dashes, linewidth=2.6 if name == "saap" else 1.7)  # fmt: skip
            ends.append((xs[-1], ys[-1], name))
        axes.set_xscale("log", base=2)
        axes.set_xticks(contexts, [thousands(c) for c in contexts])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}"))
        axes.yaxis.set_minor_locator(NullLocator())
        label_column(axes, ends)
        axes.set_ylabel("µs per layer and step, median")
        axes.set_xlabel("tokens of context")
        axes.set_title("Time of a decode step", loc="left", color=INK, fontsize=13)
        return save(figure, path)


def parts_bars(own: list[dict], context: int):
    parts = ("route", "select", "attend", "other")
    shades = ("#d1495b", "#edae49", "#00798c", "#9a9a9a")
    own = sorted((s for s in own if s["method"] != "dense"), key=lambda s: s["step_us"])
    figure, axes = plt.subplots(figsize=(WIDTH, 0.36 * (len(own) + 1) + 1.7))
    names = [s["method"] for s in own] + ["dense (packed)"]
    for part, shade in zip(parts, shades, strict=True):
        left = [sum(s[f"{p}_us"] for p in parts[: parts.index(part)]) for s in own]
        axes.barh(range(len(own)), [s[f"{part}_us"] for s in own], left=left, color=shade,
                  height=0.7, label=part)  # fmt: skip
    axes.barh(len(own), np.median([s["dense_us"] for s in own]), color=color("dense"), height=0.7)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("µs per layer and step, medians")
    axes.legend(frameon=False, ncols=4, loc="upper center", bbox_to_anchor=(0.45, -0.9 / len(own)))
    axes.set_title(f"Time of a decode step, {context:,} tokens", loc="left", color=INK,
                   fontsize=13)  # fmt: skip
    return figure


def keys_and_queries(heads: list[dict], path: Path) -> Path:
    """First two principal components of de-RoPEd keys and queries of each head."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1, len(heads), figsize=(WIDTH, 2.9), squeeze=False, layout="constrained"
        )
        for axis, head in zip(axes[0], heads, strict=True):
            for name, shade in (("keys", KEYS), ("queries", QUERIES)):
                points = np.array(head[name])
                axis.scatter(*points.T, s=7, color=shade, alpha=0.5, linewidths=0, label=name)
            axis.set_title(
                f"layer {head['layer']}, head {head['head']}\n"
                f"{head['explained']:.0%} of the variance",
                fontsize=10,
                color=INK,
            )
            axis.set_xticks([])
            axis.set_yticks([])
        handles, names = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=2, frameon=False,
                      markerscale=2.5)  # fmt: skip
        return save(figure, path)


def bucket_sizes(heads: list[dict], path: Path) -> Path:
    """Histogram of rows per bucket, the mean marked, for the same heads."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1, len(heads), figsize=(WIDTH, 2.6), squeeze=False, sharey=True, layout="constrained"
        )
        for axis, head in zip(axes[0], heads, strict=True):
            sizes = np.array(head["bucket_sizes"])
            axis.hist(sizes, bins=24, color=KEYS)
            axis.axvline(sizes.mean(), color=QUERIES, linewidth=1.6)
            imbalance = len(sizes) * (sizes**2).sum() / sizes.sum() ** 2
            axis.set_title(
                f"layer {head['layer']}, head {head['head']}\nimbalance {imbalance:.1f}, "
                f"{(sizes == 0).mean():.0%} empty",
                fontsize=10,
                color=INK,
            )
        axes[0][0].set_ylabel("buckets")
        figure.supxlabel("rows in the bucket", fontsize=10)
        return save(figure, path)
