"""Training on what it should not be trained on; memory of one layer."""

import gc

import pytest
import torch

from saap.training import TrainingOptions, prepare, train
from saap.training.plan import MAX_QUERIES, PIECE, check_variety, make_plan

from .conftest import random_model

pytestmark = pytest.mark.bad_input

SHORT = {"nlist": 8, "steps": 4, "hidden": 8, "window": 32}


def text(n: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(1, 96, (n, length), generator=torch.Generator().manual_seed(seed))


def test_a_repeated_line():
    line = text(1, 50)[0]
    sequences = list(line.repeat(4, 40)[:, :1000])
    with pytest.raises(ValueError, match=r"the corpus must have .*; got 50 distinct pieces of 16"):
        check_variety(sequences, 64)
    # Enough pieces for the buckets, and still one line again and again.
    with pytest.raises(ValueError, match="2% of the pieces have to be different"):
        check_variety(sequences, 32)
    check_variety([*sequences, *text(1, 1000)], 64)


def test_a_repeated_line_is_told_before_the_model_runs(tiny_model):
    with pytest.raises(
        ValueError, match=r"at least 22 distinct pieces of 16 tokens \(nlist=16 buckets need"
    ):
        train(tiny_model, torch.ones(4, 300, dtype=torch.long), nlist=16, window=32)


def test_pieces_are_counted_exactly():
    tokens = torch.tensor([1, 2, 3, 4, 5, 6, 7, 8, 9, 10] * 3)
    with pytest.raises(ValueError, match="10 distinct pieces of 16 tokens among 15"):
        check_variety([tokens], 11)
    other = tokens.clone()
    other[PIECE - 1] = 99  # in each of the first 15 pieces
    with pytest.raises(ValueError, match="15 distinct pieces of 16 tokens among 15"):
        check_variety([other], 16)


def test_a_loss_that_is_not_finite_names_the_layer(tiny_model, tiny_tokens, monkeypatch):
    from saap.index import fitting

    calls, fit = 0, fitting.fit_mlp

    def broken(q, *arguments, **options):
        nonlocal calls
        calls += 1
        return fit(q * torch.inf if calls == 2 else q, *arguments, **options)

    monkeypatch.setattr("saap.training.layer.fitting.fit_mlp", broken)
    with pytest.raises(
        FloatingPointError, match="layer 1: the router loss must be finite; got nan at step 0"
    ):
        train(tiny_model, tiny_tokens, **SHORT)


def test_keys_that_are_not_finite_name_the_layer(tiny_tokens):
    model = random_model("llama", num_hidden_layers=3)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(torch.inf)
    with pytest.raises(ValueError, match="layer 2: points must be finite; got NaN or inf"):
        train(model, tiny_tokens, **SHORT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nlist": 0}, "nlist must be at least 1; got 0"),
        ({"steps": 0}, "steps must be at least 1; got 0"),
        ({"window": -1}, "window must be at least 0; got -1"),
        ({"nlist": 16.0}, r"nlist must be at least 1; got 16\.0"),
        ({"steps": "3"}, "steps must be at least 1; got '3'"),
        ({"seed": None}, "seed must be at least 0; got None"),
        ({"nlist": 65537}, "nlist must be at most 65536; got 65537"),
        ({"n_segments": 4097}, "n_segments must be at most 4096; got 4097"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        TrainingOptions(**options)


@pytest.mark.parametrize("length", [66, 70, 72])
@pytest.mark.parametrize("which", ["first", "all"])
def test_sequences_in_which_no_query_is_looked_at(length, which):
    """Before a layer is trained."""
    sequences = list(text(3, 120))
    sequences[0] = sequences[0][:length]
    if which == "all":
        sequences = [t[:length] for t in sequences]
    options = TrainingOptions(nlist=16, window=33, n_sink=16)
    with pytest.raises(ValueError, match=r"longer than n_sink .* = 65 tokens by at least 8; got"):
        make_plan(sequences, options)


def test_under_autocast_it_is_the_same(tiny_model, tiny_tokens):
    expected = train(tiny_model, tiny_tokens, **SHORT)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = train(tiny_model, tiny_tokens, **SHORT)
    assert torch.equal(found.layers[0].centroids, expected.layers[0].centroids)
    assert found.metadata["recall"] == expected.metadata["recall"]


def test_tokens_that_the_model_does_not_have(tiny_model, tiny_tokens):
    size = tiny_model.get_input_embeddings().weight.shape[0]
    for wrong in (-1, size):
        tokens = tiny_tokens.clone()
        tokens[1, 5] = wrong
        with pytest.raises(
            ValueError, match=rf"token_ids must be in 0\.\.{size - 1}; got {wrong}"
        ):
            train(tiny_model, tokens, **SHORT)
    with pytest.raises(ValueError, match="token_ids must be tensors; got list"):
        train(tiny_model, tiny_tokens.tolist(), **SHORT)


def test_long_corpora_have_no_more_targets_than_short_ones():
    sequences = list(text(4, 120_000))
    plan = make_plan(sequences, TrainingOptions(nlist=64, window=64))
    assert plan.query_stride > 8
    assert 0.9 * MAX_QUERIES < plan.n_queries(range(4)) <= MAX_QUERIES
    assert plan.n_queries(range(4)) == plan.n_queries(plan.held) + plan.n_queries(plan.fitted)


def test_memory_is_that_of_one_layer(tiny_tokens):
    """What targets hold, the largest of it all, does not grow with the depth of a model."""

    def targets_alive() -> dict[int, torch.Tensor]:
        tensors = [t for t in gc.get_objects() if type(t) is torch.Tensor]
        return {id(t): t for t in tensors if t.dtype == torch.float16}

    def most_held(layers: int) -> int:
        most, others = 0, targets_alive()  # of tests before this one

        def watch(what, *_):
            nonlocal most
            if what.endswith("routers)"):
                held = [t for key, t in targets_alive().items() if key not in others]
                most = max(most, sum(t.nbytes for t in held))

        train(random_model("llama", num_hidden_layers=layers), tiny_tokens, **SHORT,
              progress=watch)  # fmt: skip
        return most

    queries = prepare(random_model("llama"), tiny_tokens, TrainingOptions(**SHORT)).plan
    targets = queries.n_queries(range(len(tiny_tokens))) * 4 * (8 + 1) * 2
    assert most_held(1) == targets
    assert most_held(3) == targets


def test_memory_needed_is_told(tiny_tokens):
    few, many = (
        prepare(random_model("llama", num_hidden_layers=n), tiny_tokens, TrainingOptions(**SHORT))
        for n in (1, 4)
    )
    assert few.memory == many.memory
    assert few.memory.hidden == 6 * 300 * 64 * 4
