"""Benchmarks that measure a pretrained model text by text, and tell after each what they know."""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

from saap import hf
from saap.eval.corpora import read_named
from saap.eval.tasks.base import text_tokens

from .cpu import cpu_name, environment
from .reports import put_table, report_path, write


def options_of(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options of a run over texts, beside the parser's own; threads are set."""
    parser.add_argument("--texts", type=int, default=6)
    parser.add_argument("--threads", type=int, help="torch's number of threads")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    return options


@torch.no_grad()
def over_texts(
    measure: Callable[[torch.nn.Module, torch.Tensor], list[dict]],
    table: Callable[[list[dict]], str],
    *,
    model: str,
    judged: str,
    context: int,
    n_texts: int,
    file: str,
    page: Path,
    command: str,
) -> None:
    """`measure` each text of `context` tokens; records go to `file`, their table into `page`."""
    read, tokenizer = hf.load_model(model), hf.load_tokenizer(model)
    text, records = b"\n".join(read_named(judged)), []
    for number in range(n_texts):
        tokens = text_tokens(tokenizer, text, context, number, n_texts)
        records += [{"text": number, **r} for r in measure(read, tokens)]
        report = {"environment": environment(), "model": model, "context": context,
                  "judged": judged, "records": records}  # fmt: skip
        write(report_path(cpu_name(), file), report)
        put_table(page, command, table(records))
        print(table(records), flush=True)
