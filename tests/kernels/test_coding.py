"""Keys are coded into the rows of a context, whatever codes them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saap.kernels.codes import encode_rows

from .code_cases import check_coding, room_for


@pytest.mark.parametrize("impl", ["reference", "numba", None])
@settings(max_examples=30, deadline=None)
@given(
    n_kv=st.integers(1, 3), n=st.sampled_from([0, 1, 16, 255, 257, 700]),
    coordinates=st.sampled_from([64, 128, 256]), first=st.integers(0, 9),
    seed=st.integers(0, 2**31),
)  # fmt: skip
def test_rows_are_coded_in_place(impl, n_kv, n, coordinates, first, seed):
    check_coding(impl, n_kv, n, coordinates, first, seed)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3, 32)}, r"x and importance must be \[2, n, 64\]"),
        ({"importance": torch.zeros(1, 64)}, r"got \(2, 3, 64\) and \(1, 64\)"),
        ({"x": torch.zeros(2, 3, 64).double()}, "must be float32; got torch.float64"),
        ({"first": 8}, "rows must be in 0..10 of sequence 0..0; got 8 to 11"),
        ({"first": -1}, "got -1 to 2"),
        ({"sequence": 1}, "of sequence 1"),
        ({"impl": "cuda"}, "impl must be None or one of reference, numba, triton; got 'cuda'"),
        ({"impl": "triton"}, "x must be on a CUDA device for impl 'triton'; got cpu"),
    ],
)
def test_bad_input(change, message):
    given = {
        "x": torch.zeros(2, 3, 64), "importance": torch.ones(2, 64),
        "codes": room_for(1, 2, 10, 64), "sequence": 0, "first": 0,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        encode_rows(**given | change)
