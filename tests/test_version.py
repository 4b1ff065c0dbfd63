"""The version of records: it changes with every module that records depend on, and no other."""

import subprocess
import sys
from pathlib import Path

import pytest

from saap.eval.environment import version
from saap.eval.sources import imported, sources

ROOT = Path(__file__).resolve().parents[1]
COUNTED = (
    "kernels/routing/numba_weights.py", "kernels/routing/reference.py",
    "kernels/attention/triton_kernels.py", "kernels/cpu/emitter.py", "index/lists.py",
    "saap/budget.py", "saap/selector.py", "saap/kv/store.py", "saap/hf/families.py",
    "saap/methods/quest.py", "saap/methods/snapshot.py", "eval/variants.py", "eval/decoding.py",
    "eval/tasks/speed.py",
)  # fmt: skip
NOT_COUNTED = ("eval/report/page.py", "eval/cli/app.py", "eval/compare.py", "eval/scores.py")


@pytest.fixture(scope="module")
def now():
    return version()


def version_after_change_of(path: Path) -> str:
    assert path.is_file()

    def read(own: Path) -> bytes:
        return own.read_bytes() + (b"\n# changed\n" if own.samefile(path) else b"")

    return version(read)


@pytest.mark.parametrize("path", COUNTED)
def test_changes_with_what_records_depend_on(now, path):
    assert version_after_change_of(ROOT / path) != now


@pytest.mark.parametrize("path", NOT_COUNTED)
def test_stays_when_only_reading_records_changes(now, path):
    assert version_after_change_of(ROOT / path) == now


def test_every_module_that_is_loaded_is_counted():
    code = (
        "import sys, saap.eval.run, saap.eval.tasks.registry, saap.kernels.routing.numba\n"
        "print(*[name for name in sys.modules if name.partition('.')[0] == 'saap'])"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    loaded = set(found.stdout.split())
    assert len(loaded) > 60
    assert loaded <= set(sources())
    assert not [n for n in sources() if n.startswith(("saap.eval.report", "saap.eval.cli"))]


def test_imports_in_all_forms():
    source = b"""
import saap.budget, os
from . import api
from ..rope import VARIANTS

def lazy():
    from .deep import thing
    try:
        import_module(".numba", __package__), import_module(f".{name}"), "saap.names"
    except ImportError:
        from saap import hf
"""
    assert set(imported(source, "saap.kernels.routing")) == {
        "saap.budget", "saap.kernels.routing", "saap.kernels.routing.api", "saap.kernels.rope",
        "saap.kernels.rope.VARIANTS", "saap.kernels.routing.deep",
        "saap.kernels.routing.deep.thing", "saap.kernels.routing.numba", "saap.names", "saap",
        "saap.hf",
    }  # fmt: skip
