"""`saap info`: an index file in a few lines, and a map of its heads."""

from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from saap.trained_index import TrainedIndex

from .cli.terminal import console

SEES_LITTLE = 0.05  # heads with less of their attention in the middle are not judged
SHADES = "░▒▓█"
STOPS = ((209, 73, 91), (237, 174, 73), (0, 121, 140))  # what is lost stands out on any ground
MARGIN = 16  # layer numbers before, a layer's recall and middle mass behind
N_WORST = 5


def check_router(index: TrainedIndex, router: str | None) -> str:
    """The router to show. ValueError names those whose recall was recorded."""
    known = [n for n in index.metadata["recall"] if n not in ("nprobe", "middle_mass")]
    if router is None:
        return index.default_router
    if router not in known:
        raise ValueError(f"--router must be one of {', '.join(known)}; got {router}")
    return router


def weighted(recall: dict, name: str) -> np.ndarray:
    """Recall of all heads, and of each layer: middle mass that is found over middle mass."""
    mass, share = np.array(recall["middle_mass"]), np.array(recall[name])
    found = np.concatenate([[(mass * share).sum()], (mass * share).sum(1)])
    return found / np.concatenate([[mass.sum()], mass.sum(1)]).clip(1e-9)


def print_index(path: Path, index: TrainedIndex, router: str, to: Console = console) -> None:
    meta, model = index.metadata, index.metadata["model"]
    recall = meta["recall"]
    names = [n for n in recall if n not in ("nprobe", "middle_mass", "oracle")]
    totals = [f"{name} {weighted(recall, name)[0]:.1%}" for name in (*names, "oracle")]
    facts = {
        "file": f"{path} ({path.stat().st_size / 1e6:.1f} MB)",
        "model": f"{model['model_type']}, {model['num_layers']} layers, {model['num_heads']} "
        f"query and {model['num_kv_heads']} KV heads of {model['head_dim']}, "
        + ", ".join(
            f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in model["rope"].items()
        ),
        "partition": f"nlist {index.nlist}, k-means on de-RoPEd keys, seed {meta['seed']}",
        "router": f"{index.default_router}, "
        f"{index.first_layer.router(index.default_router).nbytes / 1e3:,.0f} kB per layer",
        "trained on": f"{meta['corpus']['tokens']:,} tokens in contexts of {meta['context']:,}, "
        f"sinks {meta['n_sink']}, window {meta['window']}",
        "recall": f"{', '.join(totals)} of the middle's mass",
    }
    table = Table.grid(padding=(0, 2))
    table.add_column(justify="right", style="dim", no_wrap=True)
    for name, value in facts.items():
        table.add_row(name, escape(value))
    to.print(table)
    to.print(
        f"\n[bold]held-out middle recall at nprobe {recall['nprobe']} of {index.nlist}, {router}"
        "[/], layers x query heads",
        highlight=False,
    )
    print_map(recall, router, to)
    print_worst(recall, router, to)


def print_map(recall: dict, router: str, to: Console) -> None:
    """A cell a head. As many columns as fit the terminal; wide heads are cut into panels."""
    values, mass = np.array(recall[router]), np.array(recall["middle_mass"])
    room = max(16, to.width - MARGIN)
    heads = values.shape[1]
    width = next((w for w in (4, 3, 2) if heads * w <= room), 1)
    for first in range(0, heads, room // width):
        part = slice(first, min(first + room // width, heads))
        to.print(Text(" " * 5 + numbers(part, width), style="dim"))
        for layer, of_layer in enumerate(weighted(recall, router)[1:]):
            line = Text(f"{layer:>4} ", style="dim")
            for value, share in zip(values[layer, part], mass[layer, part], strict=True):
                line.append_text(cell(value, share, width, to.color_system is not None))
            judged = (mass[layer] >= SEES_LITTLE).any()
            line.append(f" {of_layer:>4.0%}" if judged else "    –")
            line.append(f" {mass[layer].mean():>4.0%}", style="dim")
            to.print(line, no_wrap=True, crop=False)
    to.print(legend(to.color_system is not None))


def numbers(part: slice, width: int) -> str:
    """Head numbers above their columns, as many as have room; then titles of the margin."""
    every = 1 if width > 2 else 4 if width == 2 else 8
    line = ""
    for head in range(part.start, part.stop):
        at = (head - part.start) * width
        if head % every == 0 or head == part.start:
            line = line.ljust(at) + f"{head:>{width}}"
    return line.ljust((part.stop - part.start) * width)[: (part.stop - part.start) * width] + (
        "  all  mid"
    )


def cell(value: float, share: float, width: int, in_color: bool) -> Text:
    if share < SEES_LITTLE:
        return Text("·".rjust(width), style="dim")
    number = f"{100 * value:>{width}.0f}" if width > 2 else ""
    if not in_color:
        return Text(number or SHADES[min(int(value * len(SHADES)), len(SHADES) - 1)] * width)
    return Text(number or " " * width, style=shade(value))


def shade(value: float) -> str:
    """Background from red over amber to teal, and letters that can be read on it."""
    place = 2 * min(max(value, 0.0), 1.0)
    low, high = (STOPS[0], STOPS[1]) if place < 1 else (STOPS[1], STOPS[2])
    red, green, blue = (
        round(a + (b - a) * (place % 1 if place < 2 else 1))
        for a, b in zip(low, high, strict=True)
    )
    ink = "black" if 0.25 < value < 0.75 else "white"
    return f"{ink} on rgb({red},{green},{blue})"


def legend(in_color: bool) -> Text:
    line = Text("     ")
    for low in (0.0, 0.25, 0.5, 0.75):
        line.append_text(cell(low + 0.125, 1.0, 2, in_color))
        line.append(f" {low:.0%} ", style="dim")
    line.append(f"  · under {SEES_LITTLE:.0%} of the attention in the middle", style="dim")
    return line


def print_worst(recall: dict, router: str, to: Console) -> None:
    """The heads that lose most, of those that look into the middle."""
    values, mass = np.array(recall[router]), np.array(recall["middle_mass"])
    judged = [(values[at], at) for at in np.ndindex(*values.shape) if mass[at] >= SEES_LITTLE]
    if not judged:
        to.print(f"no head has {SEES_LITTLE:.0%} of its attention in the middle")
        return
    to.print("[dim]worst heads[/]", highlight=False)
    for value, (layer, head) in sorted(judged)[:N_WORST]:
        to.print(
            f"[dim]{'layer':>10}[/] {layer}, head {head}: {value:.0%} "
            f"[dim](oracle {recall['oracle'][layer][head]:.0%}, "
            f"{mass[layer, head]:.0%} of its attention there)[/]",
            highlight=False,
        )
