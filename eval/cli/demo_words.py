"""`saap demo` on a pretrained model of language: a long document, questions, methods compared.

The document is Python's reference manual as it comes with every Python, so nothing is downloaded.
"""

from pathlib import Path

import numpy as np
import torch

from saap import hf
from saap.budget import Budget
from saap.methods import find_method

from ..decoding import decoder
from ..report.page import main_budget, make_report
from ..run import EvalConfig, run
from ..scores import read_scores
from ..tasks.answering import encode
from ..tasks.passkey import IN_WORDS, NAMES, insert_lines
from .progress import one_bar
from .terminal import console, plain_table, print_scores, tell_licence

MODEL = "smollm2"
SHARE = 0.05
N_KEYS = 6
ASKED_WITH = ("dense", "saap", "quest", "streaming")
METHODS = (
    "dense", "oracle-tokens", "saap", "pq", "blend", "kmeans-online", "quest", "streaming",
)  # fmt: skip


def is_installed() -> bool:
    """Whether the package with the model's weights is there."""
    try:
        hf.packaged.find_packaged(MODEL)
    except ValueError:
        return False
    return True


def manual() -> bytes:
    """Python's reference manual, about 110,000 tokens of English."""
    from pydoc_data.topics import topics

    return "\n\n".join(text for _, text in sorted(topics.items())).encode()


def document_with_keys(tokenizer, n_tokens: int, seed: int) -> tuple[torch.Tensor, list]:
    """`n_tokens` tokens of the manual in which pass keys are hidden, and `(name, key)` of each."""
    rng = np.random.default_rng(seed)
    names = [NAMES[i] for i in rng.permutation(len(NAMES))[:N_KEYS]]
    pairs = [(name, IN_WORDS.random_key(rng)) for name in names]
    text = manual()[: 8 * n_tokens]
    lines = [
        ((i + 0.5) / N_KEYS, IN_WORDS.statement(*pair).encode()) for i, pair in enumerate(pairs)
    ]
    tokens = encode(tokenizer, insert_lines(text, lines))
    while len(tokens) > n_tokens:
        text = text[: int(len(text) * n_tokens / len(tokens)) - 8]
        tokens = encode(tokenizer, insert_lines(text, lines))
    return tokens, pairs


def demo(out: Path, context: int, seed: int) -> None:
    """Read a document, ask it densely and sparsely, compare methods, make the report, in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    tell_licence(MODEL)
    model, tokenizer = hf.load_model(MODEL), hf.load_tokenizer(MODEL)
    tokens, pairs = document_with_keys(tokenizer, context - 64, seed)
    console.print(
        f"[bold]SmolLM2-135M-Instruct[/], {torch.get_num_threads()} threads.\n\n"
        f"[bold]1. Read[/] {len(tokens):,} tokens of Python's manual with {N_KEYS} pass keys in it"
    )
    with one_bar("read") as bar:
        read = hf.read_context(
            model,
            tokens,
            chunk=1024,
            progress=lambda done, total: bar(f"{total:,} tokens", done, total),
        )
    console.print(f"\n[bold]2. Ask[/] for each, visiting {SHARE:.0%} of the cache for every token")
    answers = ask(model, tokenizer, read, pairs)
    rows = [
        [name, key, *(mark(answers[method][i], key) for method in ASKED_WITH)]
        for i, (name, key) in enumerate(pairs)
    ]
    plain_table("", ("The pass key ...", "is", *ASKED_WITH), rows)

    console.print(f"\n[bold]3. Compare {len(METHODS)} methods[/] on the attention of all heads")
    config = EvalConfig(
        methods=METHODS,
        contexts=(context,),
        budgets=(0.04, 0.05, 0.075, 0.1, 0.2),
        tasks=("attention",),
        n_texts=1,
        n_queries=32,
        seed=seed,
    )
    results = out / "results"
    with one_bar("evaluate") as bar:
        run(model, tokenizer, None, manual(), config, results, model_name=MODEL, progress=bar)
    report = make_report(results)
    scores = read_scores(results)
    console.print()
    print_scores(scores, context, main_budget(scores))
    console.print(f"\nreport  {report}\nscores  {results / 'scores.json'}")


def ask(model, tokenizer, read: hf.ReadContext, pairs: list) -> dict[str, list[str]]:
    """What each method answers to each question."""
    budget = Budget.for_selectivity(SHARE, read.length)
    questions = [
        encode(tokenizer, IN_WORDS.question(name).encode(), special=False) for name, _ in pairs
    ]
    found: dict[str, list[str]] = {}
    with one_bar("ask") as bar:
        for number, name in enumerate(ASKED_WITH):
            bar(name, number, len(ASKED_WITH))
            with decoder(model, read, find_method(name)(), budget, 64) as own:
                found[name] = []
                for question in questions:
                    own.restart(budget)
                    tokens = own.greedy(question, IN_WORDS.answer_tokens)
                    found[name].append(tokenizer.decode(tokens))
        bar("all methods", len(ASKED_WITH), len(ASKED_WITH))
    return found


def mark(answer: str, key: str) -> str:
    """The digits that were said, with a tick where they are right."""
    digits = answer.strip().split()[0][: len(key)] if answer.strip() else ""
    return f"{digits} {'✓' if digits == key else '✗'}"
