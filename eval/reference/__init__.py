"""The reference model: how its text is chosen, how it is trained, and where its files lie."""

import lzma
from pathlib import Path

FOLDER = Path(__file__).parent / "files"
CONTEXT = 8192  # the longest length it was trained at


def held_out_text() -> bytes:
    """Standard-library sources that the model was never trained on; shipped, so that figures do
    not depend on the Python at hand."""
    return lzma.decompress((FOLDER / "held_out.txt.xz").read_bytes())


def split_held_out() -> tuple[bytes, bytes]:
    """Two parts without overlap: for training an index, for evaluating it."""
    text = held_out_text()
    cut = text.index(b"\n", 2 * len(text) // 3) + 1
    return text[:cut], text[cut:]
