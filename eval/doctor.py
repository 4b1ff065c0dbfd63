"""What this machine has for saap, and two tests of what it computes: see `saap doctor`."""

import importlib.metadata
import importlib.util
import platform
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

ROWS, HEADS, KV_HEADS, DIM = 777, 4, 2, 64
NEEDLE_BYTES, NEEDLE_SHARE = 2048, 0.2
SEEDS = (0, 1, 2, 3)


@dataclass(frozen=True)
class Found:
    """One part of the installation. `install`: the command that brings it; empty where it is."""

    name: str
    state: str
    use: str
    install: str = ""
    needed: bool = False


@dataclass(frozen=True)
class Check:
    name: str
    right: bool
    told: str


def installed() -> list[Found]:
    """Python, packages, devices and models, in the order in which a reader asks for them."""
    return [
        Found("Python", platform.python_version(), "everything"),
        package("torch", "everything", "pip install torch", needed=True),
        faiss(),
        package("numba", "kernels on a CPU", "pip install 'saap[cpu]'", needed=not has_gpu()),
        instructions(),
        Found("threads", str(torch.get_num_threads()), "work on a CPU (OMP_NUM_THREADS sets it)"),
        gpus(),
        package("triton", "kernels on a GPU", "pip install 'saap[gpu]'" if has_gpu() else ""),
        package("transformers", "models", "pip install 'saap[hf]'", needed=True),
        package("gguf", ".gguf models", "pip install 'saap[gguf]'"),
        *models(),
    ]


def has_gpu() -> bool:
    return torch.cuda.is_available()


def package(name: str, use: str, install: str, *, needed: bool = False) -> Found:
    """A Python package by name; nothing of it is imported."""
    if importlib.util.find_spec(name) is None:
        return Found(name, "not installed", use, install, needed)
    return Found(name, importlib.metadata.version(name), use, needed=needed)


def faiss() -> Found:
    from saap.index import faiss_backend

    use = "training and searching an index"
    if importlib.util.find_spec("faiss") is None:
        extra = "gpu" if has_gpu() else "cpu"
        return Found("FAISS", "not installed", use, f"pip install 'saap[{extra}]'")
    version = faiss_backend.load_faiss().__version__
    return Found("FAISS", f"{version}, {'GPU' if faiss_backend.has_gpu() else 'CPU'}", use)


def instructions() -> Found:
    """The instructions of this CPU that the kernels are compiled for."""
    use = "scoring of codes on a CPU"
    if importlib.util.find_spec("llvmlite") is None:
        return Found("instructions", "unknown without numba", use)
    import llvmlite.binding

    has = llvmlite.binding.get_host_cpu_features()
    if has.get("avx512f") and has.get("avx512vnni"):
        return Found("instructions", "AVX-512 VNNI", use)
    return Found("instructions", "AVX2" if has.get("avx2") else "no AVX2: plain integers", use)


def gpus() -> Found:
    if not has_gpu():
        return Found("GPU", "none that torch can use", "the CPU is used")
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return Found("GPU", ", ".join(names), "models that are put on it")


def models() -> list[Found]:
    from saap.hf.packaged import PACKAGED, find_packaged

    found = [Found("model reference", "shipped", "tests, demo")]
    for name, model in PACKAGED.items():
        try:
            find_packaged(name)
        except ValueError:
            found.append(Found(f"model {name}", "not installed", model.title, model.make))
        else:
            found.append(Found(f"model {name}", "installed", model.title))
    return found


def run(test: Callable[[], Check]) -> Check:
    """The check; where a part is missing or a kernel fails, the reason in its place."""
    try:
        return test()
    except (ImportError, ValueError, RuntimeError, OSError) as error:
        return Check(test.__name__.replace("_", " "), False, " ".join(str(error).split()))


def kernel_test() -> Check:
    """Attention over ranges by the kernel that is used here, against float64."""
    from saap.kernels.attention.api import attend_ranges, best_impl

    device = "cuda" if has_gpu() else "cpu"
    random = torch.Generator().manual_seed(0)
    q = torch.randn(2, HEADS, DIM, generator=random)
    k, v = (torch.randn(2, KV_HEADS, ROWS, DIM, generator=random) for _ in range(2))
    starts = torch.tensor([0, 100, 700], dtype=torch.int32).expand(2, KV_HEADS, 3).contiguous()
    lengths = torch.tensor([16, 333, 77], dtype=torch.int32).expand(2, KV_HEADS, 3).contiguous()
    true, _ = attend_ranges(q.double(), k.double(), v.double(), starts, lengths, impl="reference")
    plain, _ = attend_ranges(q, k, v, starts, lengths, impl="reference")
    given = [t.to(device) for t in (q, k, v, starts, lengths)]
    name = best_impl(*given[:3])
    out = attend_ranges(*given)[0].cpu()
    error, own = ((o - true).abs().max().item() for o in (out.double(), plain.double()))
    most = 2 * own + torch.finfo(torch.float32).eps
    told = f"{name} on {device}, error {error:.1e} (at most {most:.1e})"
    return Check("kernel", error <= most, told)


def needle_test() -> Check:
    """A question at the end of a long context, over all of the cache and over a part of it."""
    from saap import hf
    from saap.budget import Budget
    from saap.methods import find_method

    from . import reference
    from .decoding import decoder
    from .tasks.answering import encode
    from .tasks.passkey import IN_CODE, is_right, make_prompt

    model, tokenizer = hf.load_model(reference.FOLDER), hf.load_tokenizer(reference.FOLDER)
    text = reference.split_held_out()[1]
    answered = {"dense": 0, "saap": 0}
    for seed in SEEDS:
        prompt = make_prompt(text, NEEDLE_BYTES, np.random.default_rng(seed), n_distractors=2)
        read = hf.read_context(model, encode(tokenizer, prompt.context))
        asked = encode(tokenizer, prompt.question, special=False)
        budget = Budget.for_selectivity(NEEDLE_SHARE, read.length)
        for name in answered:
            with decoder(model, read, find_method(name)(), budget, 64) as own:
                tokens = own.greedy(asked, IN_CODE.answer_tokens)
            answered[name] += is_right(prompt, tokenizer.decode(tokens).encode())
    told = (
        f"of {len(SEEDS)} questions about {NEEDLE_BYTES:,} tokens, {answered['dense']} answered "
        f"by dense attention and {answered['saap']} by saap, which visits {NEEDLE_SHARE:.0%}"
    )
    right = answered["dense"] > len(SEEDS) // 2 and answered["saap"] >= answered["dense"] - 1
    return Check("long context", right, told)


TESTS = (kernel_test, needle_test)
