"""The heat map of a trained index: recall of each layer and head, beside what there is to find."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap

from saap.trained_index import TrainedIndex

from ..info import SEES_LITTLE, weighted
from .plots import INK, STYLE, save

UNJUDGED = "#ececec"
MOST_NUMBERS = 128  # cells of a panel beyond which numbers would be dust


def quality_map(index: TrainedIndex, router: str, path: Path) -> Path:
    """PNG: middle mass, recall of `router`, recall of the oracle; a row a layer, a column a query
    head. Heads that hardly look into the middle are grey. ValueError when it cannot be written."""
    recall = index.metadata["recall"]
    mass = np.array(recall["middle_mass"])
    panels = [("attention on the middle", mass, "Purples", mass.mean())]
    for name in dict.fromkeys((router, "oracle")):
        values = np.array(recall[name])
        panels.append((f"recall, {name}", values, "YlGnBu", weighted(recall, name)[0]))
    layers, heads = mass.shape
    side = min(0.42, 4.8 / max(layers, heads))
    size = (len(panels) * (max(2.4, side * heads) + 0.35) + 0.9, max(0.8, side * layers) + 1.55)
    with plt.rc_context({**STYLE, "axes.grid": False}):
        figure, axes = plt.subplots(
            1, len(panels), figsize=size, squeeze=False, sharey=True, layout="constrained"
        )
        for axis, (title, values, cmap, mean) in zip(axes[0], panels, strict=True):
            draw_panel(axis, values, mass, cmap, judged_only=title.startswith("recall"))
            axis.set_title(f"{title}\n{mean:.0%} in all", fontsize=10, color=INK)
            axis.set_xlabel("query head", fontsize=9)
        axes[0, 0].set_ylabel("layer", fontsize=9)
        bar = figure.colorbar(axes[0, -1].images[-1], ax=axes[0, -1], pad=0.03, fraction=0.06)
        bar.set_ticks([0, 0.5, 1], labels=["0%", "50%", "100%"], fontsize=8)
        bar.outline.set_visible(False)
        figure.suptitle(
            f"{index.metadata['model']['model_type']}: held-out mass found in "
            f"{recall['nprobe']} of {index.nlist} buckets",
            fontsize=12, color=INK, x=0.01, ha="left",
        )  # fmt: skip
        figure.supxlabel(
            f"grey: under {SEES_LITTLE:.0%} of the head's attention is in the middle",
            fontsize=8.5, color="#666666", x=0.01, ha="left",
        )  # fmt: skip
        return save(figure, path)


def draw_panel(axis, values, mass, cmap, *, judged_only: bool) -> None:
    layers, heads = values.shape
    little = mass < SEES_LITTLE
    if judged_only:
        axis.imshow(np.where(little, 1.0, np.nan), cmap=ListedColormap([UNJUDGED]), aspect="auto")
    shown = np.where(little, np.nan, values) if judged_only else values
    axis.imshow(shown, cmap=cmap, vmin=0, vmax=1, aspect="auto")
    axis.set_xticks(ticks(heads))
    axis.set_yticks(ticks(layers))
    axis.tick_params(length=0, labelsize=8.5)
    axis.spines[:].set_visible(False)
    # White lines between cells: neighbours of one colour stay countable.
    axis.set_xticks(np.arange(heads + 1) - 0.5, minor=True)
    axis.set_yticks(np.arange(layers + 1) - 0.5, minor=True)
    axis.grid(which="minor", color="white", linewidth=1.2 if heads * layers <= 256 else 0.5)
    axis.tick_params(which="minor", length=0)
    if layers * heads > MOST_NUMBERS:
        return
    for (layer, head), value in np.ndenumerate(values):
        faint = judged_only and little[layer, head]
        ink = "#aaaaaa" if faint else "white" if value > 0.55 else INK
        axis.text(head, layer, f"{100 * value:.0f}", ha="center", va="center", fontsize=8.5,
                  color=ink)  # fmt: skip


def ticks(n: int) -> list[int]:
    every = next(step for step in (1, 2, 4, 8, 16, 32) if n / step <= 12 or step == 32)
    return list(range(0, n, every))
