"""eval -> saap -> {index, kernels}: each arrow in a fresh process, and who may import what."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def loaded_after(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint('\\n'.join(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return set(done.stdout.split())


def belongs(modules: set[str], prefix: str) -> list[str]:
    return sorted(m for m in modules if m == prefix or m.startswith(prefix + "."))


@pytest.mark.parametrize(
    ("statement", "never"),
    [
        ("import saap", ["torch", "faiss", "transformers", "saap.eval", "saap.index"]),
        (
            "import saap.index.kmeans, saap.index.fitting, saap.index.ivf, saap.index.ivf_file",
            ["saap.kernels", "saap.training", "saap.eval", "transformers", "faiss"],
        ),
        (
            "import saap.kernels.attention.api",
            ["saap.index", "saap.methods", "saap.eval", "transformers", "faiss"],
        ),
        (
            "import saap.kernels.pages.api",
            ["saap.index", "saap.methods", "saap.eval", "transformers", "faiss", "vllm"],
        ),
        ("import saap.vllm", ["torch", "vllm", "saap.eval", "saap.index", "transformers"]),
        ("import saap.methods, saap.kv, saap.selector", ["saap.eval", "transformers"]),
        ("import saap.training", ["saap.eval", "matplotlib"]),
        ("import saap.eval.report.page", ["transformers", "faiss", "saap.hf"]),
    ],
)
def test_arrow(statement, never):
    modules = loaded_after(statement)
    for name in never:
        assert not belongs(modules, name), f"{statement} loads {belongs(modules, name)[:3]}"


@pytest.mark.parametrize(
    ("package", "folder", "allowed"),
    [
        ("transformers", "saap", "saap/hf/"),
        ("vllm", "saap", "saap/vllm/"),
        ("faiss", "index", "index/faiss_backend.py"),
    ],
)
def test_one_place_knows(package, folder, allowed):
    pattern = re.compile(rf"^\s*(import|from) {package}\b", re.MULTILINE)
    importers = [
        path.relative_to(ROOT).as_posix()
        for path in sorted((ROOT / folder).rglob("*.py"))
        if pattern.search(path.read_text())
    ]
    assert importers
    assert all(path.startswith(allowed) for path in importers), importers


def test_top_level_names_are_not_claimed():
    """From the root, `kernels` must not hide an installed package: transformers imports it."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    pattern = re.compile(r"^\s*(import|from) (kernels|index|eval)\b", re.MULTILINE)
    folders = "saap index kernels eval tests examples benchmarks reference_training".split()
    for folder in folders:
        for path in (ROOT / folder).rglob("*.py"):
            assert not pattern.search(path.read_text()), f"{path}: import saap.<name> instead"
