"""A layer that reads another one's keys: what it answers is what a store of its own would."""

import copy

import pytest
import torch

import saap
from saap import hf
from saap.budget import Budget
from saap.hf import models
from saap.kv import KVStore
from saap.kv.shared import SharedStore
from saap.methods import find_method
from saap.selector import LayerInfo
from saap.training import train

from .test_families import SHARING, make, saved
from .test_generate import assert_same_logits, generated, prompt

pytestmark = pytest.mark.many_steps

DIM, HEADS, N_KV = 16, 4, 2
BUDGET = Budget(max_tokens=64, n_sink=4, window=8, flush_every=32)
LAYER = LayerInfo(sm_scale=DIM**-0.5)


def selector(name="saap"):
    return find_method(name)(None).selector(LAYER)


class Pair:
    """A store over an owner's rows, and one with rows of its own, which get the same."""

    def __init__(self, batch=1, name="saap", **options):
        self.generator = torch.Generator().manual_seed(1)
        self.batch = batch
        self.owner = KVStore(selector(name), BUDGET, **options)
        self.shared = SharedStore(selector(name), BUDGET, self.owner)
        self.alone = KVStore(selector(name), BUDGET, **options)

    def draw(self, heads, length):
        return torch.randn(self.batch, heads, length, DIM, generator=self.generator)

    def go_on(self, length, mask=None):
        """Read so many tokens; whether both stores answer alike."""
        k, v = self.draw(N_KV, length), self.draw(N_KV, length)
        other, q = (self.draw(HEADS, length) * 3 for _ in range(2))
        self.owner.append(k, v, k, mask)
        self.owner.attend(other, other)
        for store in (self.shared, self.alone):
            store.append(k, v, k, mask)
        assert_alike(self.shared.attend(q, q), self.alone.attend(q, q))
        assert self.shared.visited_share == self.alone.visited_share

    def step(self):
        """One token by the fast way, if there is one."""
        k, v = self.draw(N_KV, 1), self.draw(N_KV, 1)
        other, q = (self.draw(HEADS, 1) * 3 for _ in range(2))
        self.owner.step(k, v, k, other, other)
        found = [store.step(k, v, k, q, q) for store in (self.shared, self.alone)]
        assert_alike(*found)

    @property
    def is_fast(self):
        return self.shared._steps._next is not None


def assert_alike(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["saap", "pq", "streaming"])
@pytest.mark.parametrize("kv_dtype", [None, torch.int8])
def test_it_answers_as_a_store_of_its_own(name, kv_dtype):
    pair = Pair(name=name, kv_dtype=kv_dtype)
    pair.go_on(700)
    for _ in range(70):  # rows join the middle, and buffers grow
        pair.step()
    pair.go_on(40)
    for _ in range(3):
        pair.step()
    for store in (pair.owner, pair.alone):  # between two steps that are alike
        store.reserve(5000)
    for _ in range(3):
        pair.step()
    assert pair.shared.visited_share < 0.5
    assert pair.shared.lengths == [816]


def test_steps_between_flushes_are_prepared_and_write_nothing():
    pair = Pair()
    pair.go_on(700)
    pair.go_on(1)
    pair.step()
    assert pair.is_fast
    bits = [t.view(torch.int32) for t in (pair.owner.k, pair.owner.v)]  # unused rows: any
    before = [t.clone() for t in bits]
    k = pair.draw(N_KV, 1)
    pair.owner.lengths = [n + 1 for n in pair.owner.lengths]  # as if it had written the token
    pair.shared.again(k.repeat(1, 2, 1, 1), k, k, sm_scale=DIM**-0.5)
    assert pair.shared.lengths == pair.owner.lengths
    assert_alike(before, bits)


def test_sequences_of_a_batch_come_go_and_change_places():
    pair = Pair(3)
    pair.go_on(900, torch.arange(900) >= torch.tensor([0, 250, 888])[:, None])
    for _ in range(40):
        pair.step()
    for chosen in ([2, 0, 1], [1, 1, 0], [0, 2]):
        for store in (pair.owner, pair.shared, pair.alone):
            store.select_sequences(chosen)
        pair.batch = len(chosen)
        pair.go_on(1)
        pair.step()
        pair.go_on(30)
        pair.go_on(1)


def test_what_is_truncated_is_forgotten_by_both():
    pair = Pair()
    pair.go_on(700)
    for dropped in (3, 60, 100):
        for _ in range(50):
            pair.step()
        for store in (pair.owner, pair.shared, pair.alone):
            store.truncate(dropped)
        pair.go_on(2)
        pair.go_on(1)
    for store in (pair.owner, pair.shared, pair.alone):
        store.truncate(store.length)
    pair.go_on(600)
    pair.go_on(1)


def test_drafts_rest():
    pair = Pair()
    pair.go_on(700)
    pair.go_on(1)
    with pair.owner.resting(), pair.shared.resting(), pair.alone.resting():
        for _ in range(50):
            pair.step()
    for store in (pair.owner, pair.shared, pair.alone):
        store.truncate(50)
    pair.go_on(1)


def test_copies_share_rows_with_each_other():
    pair = Pair()
    pair.go_on(700)
    pair.go_on(1)
    other = copy.deepcopy(pair)
    assert other.shared.rows is other.owner.rows is not pair.owner.rows
    for both in (pair, other):
        both.go_on(1)
        both.step()
        both.go_on(20)


def test_rows_are_counted_once():
    pair = Pair()
    pair.go_on(700)
    pair.go_on(1)
    codes = pair.alone.nbytes - pair.alone.rows.nbytes - pair.alone.rest.nbytes
    assert abs(pair.shared.nbytes - codes) < 0.05 * codes
    assert pair.shared.rest is pair.owner.rest


def test_fewer_queries_than_tokens_are_of_the_last_ones():
    pair = Pair(2)
    mask = torch.arange(700) >= torch.tensor([0, 650])[:, None]
    k, v = pair.draw(N_KV, 700), pair.draw(N_KV, 700)
    q = pair.draw(HEADS, 700)
    for store in (pair.owner, pair.alone):
        store.append(k, v, k, mask)
        expected = store.attend(q, q)
    for n in (1, 3, 60, 700):
        shared = SharedStore(selector(), BUDGET, pair.owner)
        shared.append(k, v, k, mask)
        found = shared.attend(q[:, :, -n:], q[:, :, -n:])
        for a, b in zip(found, expected, strict=True):
            assert torch.allclose(a, b[:, :, -n:], atol=1e-5)


def test_a_token_that_the_owner_did_not_get_is_refused():
    pair = Pair()
    pair.go_on(40)
    k = pair.draw(N_KV, 3)
    with pytest.raises(ValueError, match=r"got \[3\] tokens behind \[40\] where the owner has"):
        pair.shared.append(k, k, k)
    assert pair.shared.lengths == [40]


def test_a_method_with_an_order_of_its_own_is_refused():
    owner = KVStore(None, BUDGET)
    with pytest.raises(ValueError, match="leaves rows in time order, such as saap or dense; got"):
        SharedStore(selector("kmeans-online"), Budget(nprobe=2), owner)


# Models

FAMILIES = SHARING
SPARSE = Budget(max_tokens=96, n_sink=4, window=8, flush_every=32)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return make(request.param)


def shared_stores(cache):
    return [s for layer in cache.saap_layers if type(s := layer.store) is SharedStore]


def test_layers_know_whose_keys_they_have(model):
    layers = hf.model_layers(model)
    assert [layer.shares for layer in layers] == [None, None, 0, 1, 0, 1]
    assert layers[4].sliding_window == 24
    assert [layer.is_full for layer in layers] == [False, True] * 3


def test_a_step_is_sparse_in_every_layer(model):
    """And queries of the prompt are seen that `generate` has no logits for."""
    tokens = prompt(1, 800)
    with saap.attached(model, budget=SPARSE) as saap_model:
        cache = saap_model.cache()
        generated(model, {"input_ids": tokens}, max_new_tokens=3, **hf.over(cache))
        assert len(cache.saap_layers) == 3
        assert len(shared_stores(cache)) == 2
        for layer in cache.saap_layers:
            assert layer.store.visited_share < 0.2
            assert layer.store.selector.learned[0] is not None
        learned = [layer.store.selector.learned[0].mean for layer in cache.saap_layers]
        assert cache.nbytes < 1.5 * 802 * 2 * 2 * 32 * 4 + 3 * 2**20, learned


@pytest.mark.parametrize("n", [700, 2500])
def test_the_latest_queries_are_observed(model, n, monkeypatch):
    """As many as are learned from, although `generate` asks for the logits of one token."""
    seen = []
    tokens = torch.randint(3, 96, (1, n), generator=torch.Generator().manual_seed(2))
    with saap.attached(model, budget=SPARSE) as saap_model, torch.no_grad():
        cache = saap_model.cache()
        for store in shared_stores(cache):
            own = store.selector
            monkeypatch.setattr(
                own, "observe", lambda q, new, own=own: (seen.append(q.shape[2]), new)
            )
        out = model(tokens, logits_to_keep=1, **hf.over(cache))
        assert out.logits.shape[1] == 1
        model(tokens[:, :1], **hf.over(cache))
        assert seen.pop() == seen.pop() == 1
        expected = model(tokens, logits_to_keep=3, **hf.over(saap_model.cache())).logits
        assert_same_logits(out.logits, expected[:, -1:])
    sliced = model.config.model_type != "gemma3n_text"
    assert seen == [min(n, 2048) if sliced else n] * 2


def test_drafts_are_verified(model):
    tokens = prompt(1, 20, seed=5).repeat(1, 40)
    expected = generated(model, {"input_ids": tokens}, max_new_tokens=12)
    with saap.attached(model, budget=SPARSE, verify=4) as saap_model:
        cache = saap_model.cache()
        found = generated(model, {"input_ids": tokens}, max_new_tokens=12, **hf.over(cache))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 4}])
def test_beams_and_drafts_of_transformers(model, options):
    tokens = prompt(1, 12, seed=8).repeat(1, 5)
    expected = generated(model, {"input_ids": tokens}, max_new_tokens=12, **options)
    with saap.attached(model, budget=Budget(max_tokens=10_000, n_sink=4)) as saap_model:
        cache = saap_model.cache()
        found = generated(
            model, {"input_ids": tokens}, max_new_tokens=12, **options, **hf.over(cache)
        )
    assert torch.equal(found, expected)


@torch.no_grad()
@pytest.mark.parametrize("fast_memory", [None, 2**22])
@pytest.mark.parametrize("directory", [False, True])
def test_a_sparse_context_is_saved_and_goes_on(model, tmp_path, directory, fast_memory):
    if fast_memory and not directory:
        return
    tokens, path = prompt(1, 800), tmp_path / "context"
    with saap.attached(model, budget=SPARSE) as saap_model:
        whole = saap_model.cache()
        model(tokens, **hf.over(whole))
        model(tokens[:, :1], **hf.over(whole))
        expected = [model(tokens[:, i : i + 1], **hf.over(whole)).logits for i in range(1, 40)]
        options = {"directory": path, "fast_memory": fast_memory} if directory else {}
        cache = saap_model.cache(**options)
        model(tokens, **hf.over(cache))
        model(tokens[:, :1], **hf.over(cache))
        held = torch.cat([tokens[0], tokens[0, :1]])
        saap_model.save_context(cache, held, path)
        cache.close()
        again, found = saap_model.open_context(path, fast_memory=fast_memory)
        assert torch.equal(found, held)
        assert [type(layer.store) for layer in again.saap_layers[1:]] == [SharedStore] * 2
        assert all(s.rows is again.saap_layers[0].store.rows for s in shared_stores(again))
        for i, own in enumerate(expected, 1):
            step = model(tokens[:, i : i + 1], **hf.over(again)).logits
            assert_same_logits(step, own)
        again.close()


@torch.no_grad()
@pytest.mark.parametrize("directory", [False, True])
def test_an_altered_context_is_refused(tmp_path, directory):
    from saap.index import tensor_files

    model, tokens, path = make(FAMILIES[1]), prompt(1, 800), tmp_path / "context"
    with saap.attached(model, budget=SPARSE) as saap_model:
        file, kind, header, tensors = saved(saap_model, tokens, path, directory)
        for number, change, refusal in (
            (3, {"middles": [900]}, "middles must be rows behind the sinks"),
            (3, {"middles": []}, "middles"),
            (3, {"lengths": [799]}, "lengths"),
            (2, {"no_rows": None}, "layer 2"),
            (3, {"no_rows": None}, "layer 3|layers.3"),
            (1, {"no_rows": True}, "layer 1|layers.1"),
            (3, {"no_rows": False}, "no_rows as true, or not at all"),
            (
                0,
                {"cumulative_length": 5},
                "layer 0 must have seen 800 tokens .* got 5 and",
            ),
        ):
            altered = copy.deepcopy(header)
            own = {**altered["layers"][number], **change}
            altered["layers"][number] = {n: v for n, v in own.items() if v is not None}
            tensor_files.write(file, kind, altered, tensors)
            with pytest.raises(ValueError, match=refusal):
                saap_model.open_context(path)
        tensor_files.write(file, kind, header, tensors)
        saap_model.open_context(path)[0].close()


@torch.no_grad()
def test_a_context_that_was_read_goes_on(model):
    tokens = prompt(1, 800)[0]
    own = model(tokens[None]).logits[0, 780:]
    double = copy.deepcopy(model).double()(tokens[None]).logits[0, 780:]
    read = hf.read_context(model, tokens[:780], n_queries=16, chunk=300)
    assert [len(read.queries[n][0]) for n in (1, 3, 5)] == [16] * 3
    with saap.attached(model, budget=Budget(max_tokens=10_000, n_sink=4)) as saap_model:
        cache = hf.cache_from(saap_model, read, 800)
        for _ in range(2):
            found = [model(t[None, None], **hf.over(cache)).logits[0, -1] for t in tokens[780:]]
            assert_same_logits(torch.stack(found), own, double)
            hf.rewind(cache, read)
    theirs = hf.dynamic_cache_from(model, read)
    assert_same_logits(model(tokens[None, 780:], **hf.over(theirs)).logits[0], own, double)


@torch.no_grad()
def test_a_broken_forward_is_noticed(model, monkeypatch):
    """The owner has the token by then, and a layer that shares its keys has not."""
    tokens = prompt(1, 50)
    with saap.attached(model, budget=SPARSE) as saap_model:
        cache = saap_model.cache()
        model(tokens, **hf.over(cache))
        with monkeypatch.context() as patched:
            patched.setattr(model.model.layers[2].mlp, "forward", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                model(tokens[:, :1], **hf.over(cache))
        with pytest.raises(ValueError, match="a forward was broken off: start a new cache"):
            model(tokens[:, :1], **hf.over(cache))
        fresh = saap_model.cache()
        with monkeypatch.context() as patched:
            patched.setattr(model.model.layers[2].mlp, "forward", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                model(tokens, **hf.over(fresh))
        expected = model(tokens, **hf.over(saap_model.cache())).logits
        for own in (cache, fresh):
            own.reset()
            assert torch.equal(model(tokens, **hf.over(own)).logits, expected)


@torch.no_grad()
def test_a_crop_that_is_refused_changes_nothing(model):
    """The first layer has a window, and is cut first."""
    tokens = prompt(1, 80)
    with saap.attached(model, budget=SPARSE) as saap_model:
        cache = saap_model.cache()
        cache.activate_past_recording()
        model(tokens, **hf.over(cache))
        with pytest.raises(ValueError, match="truncation must leave 0 or 4 to 80 tokens"):
            cache.crop(-78)
        assert cache.slot_counts == {80}
        own = model(torch.cat([tokens, tokens[:, :1]], 1)).logits[:, -1:]
        assert_same_logits(model(tokens[:, :1], **hf.over(cache)).logits, own)


def test_what_shared_keys_do_not_allow_is_refused(model, tiny_tokens):
    with pytest.raises(ValueError, match="leaves rows in time order"):
        saap.attached(model, budget=Budget(nprobe=2), method="kmeans-online").__enter__()
    with pytest.raises(ValueError, match=r"training does; got one that has those of .* layer 2"):
        train(model, tiny_tokens, nlist=8, steps=2)
    with pytest.raises(ValueError, match=r"group must be None .* layer 2, which has .* layer 0"):
        saap.attached(model, budget=SPARSE, group=object()).__enter__()


def test_a_version_of_transformers_that_cannot_tell_is_refused(tiny_model, monkeypatch):
    few = ["full_attention"], [{}]
    monkeypatch.setattr(models, "get_layer_types_and_kwargs", lambda _: few)
    with pytest.raises(ValueError, match=r"need transformers 5\.23 or later; got \d"):
        hf.model_layers(tiny_model)
