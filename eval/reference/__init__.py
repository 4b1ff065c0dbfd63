"""The reference model: where its files lie, its held-out text, sequences to train an index on."""

import json
import lzma
from pathlib import Path

FOLDER = Path(__file__).parent / "files"
CONTEXT: int = json.loads((FOLDER / "config.json").read_text())["max_position_embeddings"]
"""The longest length it was trained at."""


def read_held_out(folder: Path) -> bytes:
    return lzma.decompress((folder / "held_out.txt.xz").read_bytes())


def held_out_text() -> bytes:
    """Sources that the model was never trained on; shipped, so that figures do not depend on the
    Python at hand."""
    return read_held_out(FOLDER)


def split_held_out(folder: Path = FOLDER) -> tuple[bytes, bytes]:
    """Two parts without overlap: for training an index, for evaluating it."""
    text = read_held_out(folder)
    cut = text.index(b"\n", 2 * len(text) // 3) + 1
    return text[:cut], text[cut:]
