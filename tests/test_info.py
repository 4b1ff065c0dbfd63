"""The map of heads that `saap info` shows, and the picture of it."""

import dataclasses
import io

import numpy as np
import pytest
import torch
from rich.console import Console

from saap.eval.info import check_router, print_index, print_map, weighted
from saap.eval.report.quality_map import quality_map


def recall_of(layers: int, heads: int) -> dict:
    generator = torch.Generator().manual_seed(0)
    mass, oracle, mlp = torch.rand(3, layers, heads, generator=generator)
    mass[0, 0] = 0.01
    return {"nprobe": 4, "middle_mass": mass.tolist(), "oracle": oracle.tolist(),
            "mlp": (oracle * mlp).tolist()}  # fmt: skip


def with_recall(index, recall):
    layers, heads = np.shape(recall["mlp"])
    model = {**index.metadata["model"], "num_layers": layers, "num_heads": heads}
    return dataclasses.replace(
        index, metadata={**index.metadata, "recall": recall, "model": model}
    )


def shown(width: int, **options) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, width=width, **options), out


@pytest.mark.parametrize(("layers", "heads"), [(4, 8), (32, 32), (2, 64), (3, 128)])
def test_maps_of_any_size_fit_a_terminal(tiny_index, tmp_path, layers, heads):
    recall = recall_of(layers, heads)
    console, out = shown(80)
    print_index(tmp_path, with_recall(tiny_index, recall), "mlp", console)
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    panels = -(-heads // 64)
    assert len(lines) <= panels * (layers + 2) + 16
    assert f"layer {worst(recall)[0]}, head {worst(recall)[1]}: " in out.getvalue()


def worst(recall) -> tuple[int, int]:
    values = np.where(np.array(recall["middle_mass"]) < 0.05, 2.0, np.array(recall["mlp"]))
    return np.unravel_index(values.argmin(), values.shape)


def test_numbers_where_there_is_room_and_colors_where_there_are_some():
    recall = {
        "nprobe": 1, "middle_mass": [[0.5, 0.01, 0.5]], "mlp": [[0.07, 0.9, 0.93]],
    }  # fmt: skip
    console, out = shown(80)
    print_map(recall, "mlp", console)
    assert out.getvalue().splitlines()[1] == "   0    7   ·  93  50%  34%"
    console, out = shown(80, force_terminal=True, color_system="truecolor")
    print_map(recall, "mlp", console)
    row = out.getvalue().splitlines()[1]
    assert row.count("\x1b[") >= 3
    assert "48;2;" in row


def test_layers_weigh_heads_by_their_mass():
    recall = {"middle_mass": [[0.3, 0.1], [0.0, 0.1]], "mlp": [[1.0, 0.0], [1.0, 0.5]]}
    assert weighted(recall, "mlp") == pytest.approx([0.7, 0.75, 0.5])


def test_an_unknown_router(tiny_index):
    assert check_router(tiny_index, None) == "mlp"
    with pytest.raises(ValueError, match="--router must be one of oracle, centroid, linear"):
        check_router(tiny_index, "tree")


@pytest.mark.parametrize(("layers", "heads"), [(2, 4), (32, 32)])
def test_picture(tiny_index, tmp_path, layers, heads):
    index = with_recall(tiny_index, recall_of(layers, heads))
    path = quality_map(index, "mlp", tmp_path / "x.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_picture_that_cannot_be_written(tiny_index, tmp_path):
    with pytest.raises(ValueError, match=r"cannot be written|must end in one of"):
        quality_map(tiny_index, "mlp", tmp_path / "none" / "x.png")
    with pytest.raises(ValueError, match=r"cannot be written|must end in one of"):
        quality_map(tiny_index, "mlp", tmp_path / "x.tree")
