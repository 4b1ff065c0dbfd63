"""Damaged and crafted files: one ValueError, or what was opened can be used."""

import json

import pytest
import torch

import saap
from saap import TrainedIndex, context_file, index_file
from saap.eval import records as eval_records
from saap.eval.checks import check_folder
from saap.eval.compare import compare
from saap.eval.scores import score_run
from saap.hf import over
from saap.index import tensor_files

from ..test_contexts import SMALL, read
from ..test_generate import make, prompt
from ..test_records import ATTENTION, COSTS
from .hostile import cases, damaged, mutated

pytestmark = pytest.mark.bad_input


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    from saap.training import train

    model = make("llama")
    index = train(model, prompt(4, 200), nlist=8, steps=2, hidden=8, window=16, n_sink=4)
    folder = tmp_path_factory.mktemp("fuzz")
    index.save(folder / "index.st")
    with saap.attached(model, index, SMALL, method="blend") as saap_model:
        read(saap_model, prompt(1, 100), folder / "context.st")
    return model, index, folder


def crafted(own, path, kind, target):
    """The file with its header or a tensor changed, and every checksum made good."""
    header, tensors = tensor_files.read(path, kind)
    tensors = {name: t.clone() for name, t in tensors.items()}
    for _ in range(own.choice((1, 1, 2))):
        if own.random() < 0.5:
            header = mutated(own, header)
            header = header if isinstance(header, dict) else {}
            continue
        name = own.choice(sorted(tensors))
        t = tensors[name]
        change = own.randrange(7)
        if change == 0:
            del tensors[name]
        elif change == 1:
            tensors[name] = t.flatten()[: own.randrange(t.numel() + 1)].clone()
        elif change == 2 and t.ndim:
            tensors[name] = torch.cat([t, t], own.randrange(t.ndim))
        elif change == 3:
            tensors[name] = t.to(own.choice((torch.float32, torch.int32, torch.int64)))
        elif change == 4 and t.ndim:
            tensors[name] = t[..., :0].clone()
        elif t.numel():
            t.view(-1)[own.randrange(t.numel())] = (
                own.choice((torch.nan, torch.inf, -1e30, 0.0))
                if t.is_floating_point()
                else own.choice((-1, 0, 1, 100))
            )
        if not tensors:
            break
    try:
        tensor_files.write(target, kind, header, tensors)
    except (ValueError, TypeError, OverflowError):
        return False
    return True


def decode(model, saap_model, cache):
    with torch.no_grad():
        for number in range(2):
            model(torch.tensor([[5 + number]]), **over(cache))


@pytest.mark.parametrize("by", ["damage", "craft"])
def test_index_files(files, by, tmp_path):
    model, _, folder = files
    data, path = (folder / "index.st").read_bytes(), tmp_path / "index.st"
    for own, counts in cases(f"index files by {by}", 30):
        if by == "damage":
            path.write_bytes(damaged(own, data))
        elif not crafted(own, folder / "index.st", index_file.FORMAT, path):
            continue
        try:
            index = TrainedIndex.load(path)
            with saap.attached(model, index, SMALL, method="blend") as saap_model:
                cache = saap_model.cache()
                with torch.no_grad():
                    model(prompt(1, 60), **over(cache))
                decode(model, saap_model, cache)
        except ValueError as error:
            assert len(str(error).splitlines()) == 1
            counts["refused"] = counts.get("refused", 0) + 1


@pytest.mark.parametrize("by", ["damage", "craft"])
def test_context_files(files, by, tmp_path):
    model, index, folder = files
    data, path = (folder / "context.st").read_bytes(), tmp_path / "context.st"
    with saap.attached(model, index, SMALL, method="blend") as saap_model:
        for own, counts in cases(f"context files by {by}", 30):
            path.unlink(missing_ok=True)  # the one before may be mapped
            if by == "damage":
                path.write_bytes(damaged(own, data))
            elif not crafted(own, folder / "context.st", context_file.FORMAT, path):
                continue
            try:
                cache, _ = saap_model.open_context(path)
                decode(model, saap_model, cache)
            except ValueError as error:
                assert len(str(error).splitlines()) == 1
                counts["refused"] = counts.get("refused", 0) + 1


RUN = {"config": {"seed": 1, "n_texts": 2}, "model": "m", "version": "1", "index": None,
       "environment": {"device": "cpu", "packages": {"torch": "2"}}}  # fmt: skip
ANSWER = {"task": "passkey", "context": 512, "method": "saap", "budget": "0.05", "accuracy": 1.0,
          "depth": 0.5, **COSTS}  # fmt: skip
TEXT = {"task": "perplexity", "context": 512, "method": "dense", "budget": "0.05", "nll": 5.0,
        "tokens": 9, **COSTS}  # fmt: skip


def test_result_folders(tmp_path):
    for own, counts in cases("result folders", 100):
        run, lines = RUN, []
        for number in range(3):
            for record in (ATTENTION, {**ATTENTION, "method": "dense"}, ANSWER, TEXT):
                lines.append({"unit": f"u{number}", **record})
            lines.append({"done": f"u{number}", "input": "abc"})
        if own.random() < 0.3:
            run = mutated(own, run)
        for _ in range(own.choice((1, 1, 3))):
            at = own.randrange(len(lines))
            lines[at] = mutated(own, lines[at])
        content = "".join(json.dumps(line) + "\n" for line in lines).encode()
        if own.random() < 0.2:
            content = damaged(own, content)
        (tmp_path / eval_records.RUN).write_text(json.dumps(run))
        (tmp_path / eval_records.RECORDS).write_bytes(content)
        for read_folder in (
            score_run,
            check_folder,
            lambda path: compare(path, path),
            lambda path: eval_records.RecordFile(path, {**RUN, "version": "1"}),
        ):
            try:
                read_folder(tmp_path)
            except ValueError as error:
                assert len(str(error).splitlines()) == 1
                counts["refused"] = counts.get("refused", 0) + 1
