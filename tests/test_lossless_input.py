"""What lossless decoding refuses."""

import copy

import pytest
import torch

from saap.hf import over

from .lossless_cases import attached, inputs_of, small_llama
from .test_generate import generated, make, prompt, random_index


@pytest.fixture(scope="module")
def llama():
    return small_llama()


BAD = {
    "beams": ({"num_beams": 2}, r"must be greedy_search or sample .*; got beam_search"),
    "lookup": ({"prompt_lookup_num_tokens": 3}, "got assisted_generation"),
    "loop": ({"custom_generate": print}, "custom_generate must be None where verify is set"),
    "states": (
        {"output_hidden_states": True, "return_dict_in_generate": True},
        "output_hidden_states must be False where verify is set; got True",
    ),
}


@pytest.mark.parametrize("wrong", BAD)
def test_bad_options(llama, wrong):
    model, index = llama
    options, message = BAD[wrong]
    with attached(model, index) as saap_model:
        cache = saap_model.cache()
        with pytest.raises(ValueError, match=message):
            generated(model, {"input_ids": prompt(1, 9), **options}, **over(cache))
        assert cache.lengths == []


@pytest.mark.parametrize("drafts", [0, -1, True, 2.0, "8"])
def test_bad_number_of_drafts(llama, drafts):
    model, index = llama
    with (
        pytest.raises(
            ValueError, match=f"verify must be an integer of at least 1; got {drafts!r}"
        ),
        attached(model, index, verify=drafts),
    ):
        pass


def test_cache_of_another_block_and_a_copy(llama):
    model, index = llama
    inputs = inputs_of(prompt(1, 30))
    with attached(model, index, verify=None) as saap_model:
        other = saap_model.cache()
    with attached(model, index) as saap_model:
        with pytest.raises(ValueError, match="this SaapCache must belong to this model and block"):
            generated(model, inputs, **over(other))
        copied = copy.deepcopy(model)
        assert torch.equal(generated(copied, inputs), generated(model, inputs))
    with attached(copied, index, verify=None) as saap_model:
        cache = saap_model.cache()
        generated(copied, inputs, **over(cache))
        assert cache.pace is None


@pytest.mark.parametrize("family", ["dynamic", "longrope"])
def test_rope_that_depends_on_the_length_is_refused(family):
    model = make(family)
    with (
        pytest.raises(ValueError, match=rf"must not be dynamic or longrope; got '{family}'"),
        attached(model, random_index(model)),
    ):
        pass
