"""Every code block of README and docs runs, or it is said here why it cannot."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import torch

import saap
from saap.eval import reference
from saap.hf.packaged import find_packaged

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TESTED_ELSEWHERE = {"adding_a_method.md": "test_adding_a_method", "scale.md": "test_distributed"}
NEEDS = {"import lm_eval": "lm_eval", "from openai": "openai"}
OTHERS = {"source", "pytest", "pip", "make", "python", "torchrun"}


def blocks(kind: str):
    fence = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
    for page in PAGES:
        own = [code for name, code in fence.findall(page.read_text()) if name == kind]
        for number, code in enumerate(own):
            yield pytest.param(page.name, code, id=f"{page.name}-{number}")


@pytest.fixture
def names(reference_model, reference_tokenizer, reference_index, captured, tmp_path, monkeypatch):
    """What a page may take as given: a model, its tokenizer, an index, a prompt, keys."""
    monkeypatch.chdir(tmp_path)
    reference_index.save("index.safetensors")
    text = reference.split_held_out()[1][:300].decode(errors="ignore")
    monkeypatch.setattr(reference_model.generation_config, "max_new_tokens", 4)
    layer = reference_index.first_layer
    n_kv, dim = layer.centroids.shape[0], layer.centroids.shape[2]
    random = torch.Generator().manual_seed(0)

    def some(*shape):
        return torch.randn(*shape, generator=random)

    method = saap.METHODS["kmeans"](reference_index)
    store = saap.KVStore(
        method.selector(saap.LayerInfo(sm_scale=dim**-0.5, number=0)),
        saap.Budget(max_tokens=64, window=32),
    )
    keys = some(1, n_kv, 400, dim)
    store.append(keys, keys, keys)
    return {
        "saap": saap, "torch": torch, "model": reference_model, "tokenizer": reference_tokenizer,
        "index": reference_index, "inputs": reference_tokenizer(text, return_tensors="pt"),
        "layer": layer, "head_dim": dim, "n_layers": 1, "i": 0, "rotate": lambda x: x,
        "k": some(1, n_kv, 1, dim), "v": some(1, n_kv, 1, dim), "q": some(1, 2 * n_kv, 1, dim),
        "k_rope": some(n_kv, 300, dim), "k_derope": some(n_kv, 300, dim),
        "positions": torch.arange(300), "q_rope": some(2, 2 * n_kv, dim),
        "q_derope": some(2, 2 * n_kv, dim), "store": store,
    }  # fmt: skip


@pytest.mark.parametrize(("page", "code"), blocks("python"))
def test_python_runs(page, code, names):
    if page in TESTED_ELSEWHERE and "directory=" not in code:
        pytest.skip(f"{TESTED_ELSEWHERE[page]} runs it")
    for sign, package in NEEDS.items():
        if sign in code and importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}")
    if '"smollm2")' in code and '"path/to/model"' not in code:
        try:
            find_packaged("smollm2")
        except ValueError:
            pytest.skip("needs smollm2")
    if "store.truncate" in code:
        pytest.skip("signatures, of a store with three sequences")
    code = code.replace('"path/to/model"', repr(str(reference.FOLDER)))
    code = code.replace("nprobe=32", "nprobe=4")
    exec(compile(code, page, "exec"), names)


def commands_of(code: str):
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            yield words


@pytest.mark.parametrize(("page", "code"), blocks(""))
def test_commands_exist(page, code):
    """Names of commands and of options: running them all takes minutes."""
    import typer

    from saap.eval.cli.app import app

    known = typer.main.get_command(app).commands
    if "saap " not in code or "──►" in code or "│" in code:
        return
    for words in commands_of(code):
        if words[0] != "saap":
            continue
        assert words[1] in known, f"{page}: {words}"
        if words[1:] and words[1] != "COMMAND":
            options = {o for p in known[words[1]].params for o in (*p.opts, *p.secondary_opts)}
            given = {w.split("=")[0] for w in words if w.startswith("--")}
            assert given <= options, f"{page}: {words}"


def hooks():
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_commands_is_complete():
    made = hooks()
    page = made.on_page_markdown((ROOT / "docs" / "cli.md").read_text())
    assert made.MARK not in page
    for name, command in made.commands().items():
        own = page.split(f"## saap {name}\n")[1].split("\n## ")[0]
        for parameter in command.params:
            shown = parameter.name.upper() if parameter.param_type_name == "argument" else None
            for word in [shown] if shown else parameter.opts:
                assert word == "--help" or f"`{word}" in own, (name, word)


def test_every_page_has_its_place():
    navigation = (ROOT / "mkdocs.yml").read_text().split("nav:")[1]
    assert [p.name for p in PAGES[1:] if p.name not in navigation] == []


def test_links_between_pages_hold():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:\s]+\.(?:md|png))", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
