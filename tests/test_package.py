"""Wheel, sdist and editable install of a copy of the tree hold what they should, offline."""

import ast
import importlib
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("setuptools", minversion="77", reason="license expressions need setuptools 77")

ROOT = Path(__file__).resolve().parents[1]
# What lies where in a checkout, and under which folder of a wheel.
FOLDERS = {"saap": "saap", "index": "saap/index", "kernels": "saap/kernels", "eval": "saap/eval"}
NOT_OURS = shutil.ignore_patterns(
    ".*", "__pycache__", "build", "dist", "runs", "demo", "*.egg-info"
)
DATA = {"saap/py.typed", "saap/eval/report/report.html"}


def build(tree: Path, kind: str, out: Path) -> Path:
    """What the build backend makes of `tree`, as a front end without isolation asks it."""
    code = (
        "import sys; from setuptools import build_meta;"
        "print('made', getattr(build_meta, 'build_' + sys.argv[1])(sys.argv[2]))"
    )
    out.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", code, kind, str(out)], cwd=tree, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return out / re.search(r"^made (\S+)$", done.stdout, re.MULTILINE)[1]


def names_of(wheel: Path) -> set[str]:
    return {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return shutil.copytree(ROOT, tmp_path_factory.mktemp("copy") / "saap", ignore=NOT_OURS)


@pytest.fixture(scope="module")
def expected(tree):
    modules = {
        f"{inside}/{path.relative_to(tree / folder).as_posix()}"
        for folder, inside in FOLDERS.items()
        for path in (tree / folder).rglob("*.py")
    }
    files = {f"saap/eval/reference/files/{p.name}" for p in tree.glob("eval/reference/files/*")}
    assert len(files) > 5
    return modules | files | DATA


@pytest.fixture(scope="module")
def sdist(tree, tmp_path_factory):
    return build(tree, "sdist", tmp_path_factory.mktemp("sdist") / "out")


def test_the_tree_has_no_links():
    folders = (*FOLDERS, "tests", "docs", "benchmarks", "examples")
    assert [p for folder in folders for p in (ROOT / folder).rglob("*") if p.is_symlink()] == []


def test_wheel_holds_all_modules_and_data_and_no_more(tree, expected, tmp_path):
    wheel = build(tree, "wheel", tmp_path / "out")
    names = names_of(wheel)
    assert names == expected
    # The reference model's files and the sequences of the demo; how it was trained stays here.
    scripts = {n.rsplit("/", 1)[1] for n in names if n.startswith("saap/eval/reference/")}
    assert not scripts & {p.name for p in tree.glob("reference_training/*.py")} - {"__init__.py"}
    entry = "saap-0.1.0.dist-info/entry_points.txt"
    assert "saap = saap.eval.cli.app:main" in zipfile.ZipFile(wheel).read(entry).decode()


def test_sdist_builds_the_same_wheel(sdist, expected, tmp_path):
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.iterdir()
    held = {p.name for p in unpacked.iterdir()}
    assert {"pyproject.toml", "README.md", "LICENSE", "PKG-INFO", *FOLDERS} <= held
    assert not held & {"tests", "benchmarks", "reference_training", ".venv"}
    assert names_of(build(unpacked, "wheel", tmp_path / "out")) == expected


def test_editable_install_maps_every_folder(tree, tmp_path):
    """Found from anywhere, and from the root, where `saap/` in the current folder comes first."""
    zipfile.ZipFile(build(tree, "editable", tmp_path / "out")).extractall(tmp_path / "site")
    (finder,) = (tmp_path / "site").glob("__editable__*_finder.py")
    mapping = ast.literal_eval(re.search(r"^MAPPING.*?= (.*)$", finder.read_text(), re.M)[1])
    assert mapping["saap"] == str(tree / "saap")
    assert mapping["saap.index"] == str(tree / "index")
    places = {
        "saap.hf": "saap/hf", "saap.index.kmeans": "index", "saap.kernels": "saap/kernels",
        "saap.kernels.attention": "kernels/attention", "saap.kernels.cpu.functions": "kernels/cpu",
        "saap.kernels.routing": "kernels/routing", "saap.eval.cli.app": "eval/cli",
        "saap.eval.reference": "eval/reference", "saap.eval.report.page": "eval/report",
    }  # fmt: skip
    # -S: without the site-packages of this interpreter, which may hold another saap.
    code = (
        "import importlib.util, os, site, sys; site.addsitedir(sys.argv[1])\n"
        "for name in sys.argv[2:]: print(os.path.dirname(importlib.util.find_spec(name).origin))"
    )
    for folder in (tree, tmp_path):
        done = subprocess.run(
            [sys.executable, "-S", "-c", code, str(tmp_path / "site"), *places],
            capture_output=True, text=True, cwd=folder,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == [str(tree / place) for place in places.values()]


SCRIPTS = [p for folder in ("benchmarks", "examples", "reference_training", "docs")
           for p in sorted((ROOT / folder).rglob("*.py"))]  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_what_a_script_takes_from_saap_is_there(script):
    """Most scripts need what no test has: a GPU, vLLM, hours."""
    for node in ast.walk(ast.parse(script.read_text())):
        if not isinstance(node, ast.ImportFrom) or (node.module or "").split(".")[0] != "saap":
            continue
        try:
            module = importlib.import_module(node.module)
            for name in node.names:
                if not hasattr(module, name.name):
                    importlib.import_module(f"{node.module}.{name.name}")
        except ModuleNotFoundError as error:  # of a package that is not installed, such as vLLM
            if error.name is None or error.name.startswith("saap"):
                raise


def test_lint():
    """Above all names that are not there, in what no test runs."""
    ruff = shutil.which("ruff", path=str(Path(sys.executable).parent)) or shutil.which("ruff")
    if ruff is None:
        pytest.skip("needs ruff")
    done = subprocess.run(
        [ruff, "check", "--no-cache", "--output-format", "concise", "."],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
