"""`saap explain`: what is told of one prompt, against attention computed here."""

import itertools

import pytest
import torch

from saap import hf
from saap.eval import reference
from saap.eval.explain import explain
from saap.eval.variants import make_variants

from .test_cli import run_cli

KEY = "amber4821733"


@pytest.fixture(scope="module")
def prompt():
    text = reference.split_held_out()[1][:2600].decode(errors="ignore")
    return f"{text[:900]}\npass key of amber: {KEY}\n{text[900:]}\namber"


@pytest.fixture(scope="module")
def explained(reference_model, prompt):
    tokenizer = hf.load_tokenizer(reference.FOLDER)
    variants = make_variants(("oracle-tokens", "saap", "streaming", "dense"), None, 0)
    return explain(reference_model, tokenizer, prompt, variants, share=0.1, passage=KEY)


def test_shares_are_of_the_attention(explained, reference_model, prompt):
    tokenizer = hf.load_tokenizer(reference.FOLDER)
    tokens = torch.tensor(tokenizer(prompt)["input_ids"])
    (passage,) = explained.passages
    assert passage.text == KEY
    assert tokenizer.decode(tokens[slice(*passage.tokens)].tolist()) == KEY
    reference_model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            attentions = reference_model(tokens[None], output_attentions=True).attentions
    finally:
        reference_model.set_attn_implementation("sdpa")
    mass = torch.stack([own[0, :, -1, slice(*passage.tokens)].sum(-1) for own in attentions])
    assert passage.mass == pytest.approx(float(mass.mean()), rel=1e-3)
    best = explained.heads[0]
    assert best.mass == pytest.approx(float(mass.max()), rel=1e-3)
    assert (best.layer, best.head) == divmod(int(mass.argmax()), mass.shape[1])
    assert best.rank == 1


def test_what_is_found_follows_the_methods(explained):
    found = explained.passages[0].found
    assert found["dense"] == pytest.approx(1.0)
    assert found["oracle-tokens"] > 0.99
    assert found["saap"] > 0.95
    assert found["streaming"] == 0
    assert explained.found["oracle-tokens"] >= explained.found["saap"] > 0.8


def test_passages_are_found_without_one_being_named(reference_model, prompt):
    tokenizer = hf.load_tokenizer(reference.FOLDER)
    variants = make_variants(("streaming",), None, 0)
    found = explain(reference_model, tokenizer, prompt, variants, share=0.1)
    assert any("482" in passage.text for passage in found.passages[:2])
    ends = sorted(passage.tokens for passage in found.passages)
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(ends))


def test_the_command(monkeypatch, capsys, tmp_path, prompt):
    path = tmp_path / "prompt.txt"
    path.write_text(prompt)
    code, out, err = run_cli(
        monkeypatch, capsys, "explain", "reference", "--prompt-file", path, "--passage", KEY,
        "--methods", "saap,streaming", "--budget", 0.1,
    )  # fmt: skip
    assert code == 0, err
    assert KEY in out
    assert "layer 1, head" in out


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--passage", "not there"), "passage must occur in the prompt"),
        (("--methods", "quickest"), "quickest"),
        (("--budget", 0.01), "selectivity must be above"),
        (("--prompt-file", "nowhere.txt"), "nowhere.txt"),
    ],
)
def test_bad_input(options, message, monkeypatch, capsys, tmp_path, prompt):
    path = tmp_path / "prompt.txt"
    path.write_text(prompt)
    code, _, err = run_cli(
        monkeypatch, capsys, "explain", "reference", "--prompt-file", path, *options
    )
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1
