"""Every kind of bad input is refused: the error says what must hold and what was got."""

import pytest
import torch

from saap.kernels.attention import (
    attend_dense,
    attend_ranges,
    attend_shared_prefix,
    merge_states,
    validate,
)

pytestmark = pytest.mark.bad_input

IMPLS = ["reference", "numba", None]
N = 50


def inputs(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    """Two sequences, 4 query heads on 2 KV heads, three ranges a list; `changes` replace."""
    generator = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 2, 2, N, 32, generator=generator)
    starts = torch.tensor([0, 20, 40], dtype=torch.int32).repeat(2, 2, 1)
    good = {
        "q": torch.randn(2, 4, 32, generator=generator),
        "k": k,
        "v": v,
        "starts": starts,
        "lengths": torch.full_like(starts, 10),
    }
    return good | changes


def put(name: str, at: tuple[int, ...], value: int) -> dict[str, torch.Tensor]:
    changed = inputs()[name]
    changed[at] = value
    return {name: changed}


def empty(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


REFUSED = {
    "q rank": ({"q": empty(2, 4, 1, 32)}, r"q must be \[B, Hq, D\]; got \(2, 4, 1, 32\)"),
    "k rank": ({"k": empty(2, N, 32)}, r"k must be \[B, Hkv, N, D\]; got \(2, 50, 32\)"),
    "v rank": ({"v": empty(2, N, 32)}, r"v must be \[B, Hkv, N, D\]; got \(2, 50, 32\)"),
    "v unlike k": (
        {"v": empty(2, 2, N + 1, 32)},
        r"v must be like k, .*\(2, 2, 50, 32\); got .*\(2, 2, 51, 32\)",
    ),
    "v's dtype": (
        {"v": empty(2, 2, N, 32).half()},
        r"v must be like k, torch\.float32 .*; got torch\.float16",
    ),
    "batch": (
        {"q": empty(3, 4, 32)},
        r"k must have the B and D of q, 3 and 32; got \(2, 2, 50, 32\)",
    ),
    "head_dim": (
        {"q": empty(2, 4, 64)},
        r"k must have the B and D of q, 2 and 64; got \(2, 2, 50, 32\)",
    ),
    "heads": ({"q": empty(2, 5, 32)}, "q must have a multiple of the 2 heads of k; got 5"),
    "no heads": ({"q": empty(2, 0, 32)}, "q must have a multiple of the 2 heads of k; got 0"),
    "integers": (
        {"q": empty(2, 4, 32).int()},
        r"q must have dtype float32, bfloat16.*; got torch\.int32",
    ),
    "int64 starts": (
        {"starts": inputs()["starts"].long()},
        r"starts must have dtype int32; got torch\.int64",
    ),
    "int64 lengths": (
        {"lengths": inputs()["lengths"].long()},
        r"lengths must have dtype int32; got torch\.int64",
    ),
    "starts rank": (
        {"starts": empty(2, 3, dtype=torch.int32)},
        r"starts must be .*B = 2, Hkv = 2, Hq = 4; got \(2, 3\)",
    ),
    "lists": (
        {"starts": empty(2, 3, 3, dtype=torch.int32)},
        r"starts must be .*Hkv = 2, Hq = 4; got \(2, 3, 3\)",
    ),
    "lengths unlike starts": (
        {"lengths": empty(2, 2, 4, dtype=torch.int32)},
        r"lengths must have the shape of starts, \(2, 2, 3\); got \(2, 2, 4\)",
    ),
    "beyond N": (
        put("lengths", (1, 0, 2), 11),
        r"at most N = 50; got starts\[1, 0, 2\] = 40, lengths\[1, 0, 2\] = 11",
    ),
    "beyond int32": (
        put("starts", (0, 1, 1), 2**31 - 1),
        r"at most N = 50; got starts\[0, 1, 1\] = 2147483647, ",
    ),
    "negative length": (
        put("lengths", (0, 1, 0), -1),
        r"lengths must be at least 0; got .*lengths\[0, 1, 0\] = -1",
    ),
    "negative start": (
        put("starts", (1, 1, 0), -3),
        r"starts must be at least 0; got starts\[1, 1, 0\] = -3, ",
    ),
    "k elsewhere": (
        {"k": empty(2, 2, N, 32, device="meta"), "v": empty(2, 2, N, 32, device="meta")},
        "k must be on cpu, as q; got meta",
    ),
    "starts elsewhere": (
        {"starts": empty(2, 2, 3, dtype=torch.int32, device="meta")},
        "starts must be on cpu, as q; got meta",
    ),
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(changes, message, impl):
    with pytest.raises(ValueError, match=message):
        attend_ranges(**inputs(**changes), impl=impl)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sm_scale": float("nan")}, "sm_scale must be finite; got nan"),
        ({"softcap": 0.0}, "softcap must be .*above 0; got 0.0"),
        ({"softcap": float("inf")}, "softcap must be .*finite.*; got inf"),
        ({"impl": "cuda"}, "impl must be .*reference, numba, triton; got 'cuda'"),
    ],
    ids=str,
)
def test_refused_options(options, message):
    with pytest.raises(ValueError, match=message):
        attend_ranges(**inputs(), **options)


def test_numba_names_its_own_limits_and_none_takes_what_can():
    odd_dim = {name: x[..., :24].contiguous() for name, x in inputs().items() if name in "qkv"}
    transposed = inputs()["k"].transpose(2, 3).contiguous().transpose(2, 3)
    for changes, message in (
        (odd_dim, "head_dim must be a multiple of 16 for impl 'numba'; got 24"),
        ({"k": transposed}, "k must have stride 1 over D for impl 'numba'; got 50"),
        (
            {"q": inputs()["q"].double()},
            r"q must have dtype .* for impl 'numba'; got torch\.float64",
        ),
    ):
        given = inputs(**changes)
        with pytest.raises(ValueError, match=message):
            attend_ranges(**given, impl="numba")
        for got, want in zip(
            attend_ranges(**given), attend_ranges(**given, impl="reference"), strict=True
        ):
            assert torch.equal(got, want)


@pytest.mark.parametrize("impl", ["reference", "numba"])
def test_strided_inputs_are_read_in_place(impl):
    given = inputs()
    strided = {
        "q": torch.stack([given["q"], given["q"] - 1], dim=1)[:, 0],
        "k": given["k"].transpose(1, 2).contiguous().transpose(1, 2),
        "v": torch.cat([given["v"], given["v"]], dim=-1)[..., :32],
        "starts": torch.stack([given["starts"], given["starts"]], dim=-1)[..., 0],
        "lengths": given["lengths"][:1, :1].expand(2, 2, 3),
    }
    assert not any(x.is_contiguous() for x in strided.values())
    for x, y in zip(
        attend_ranges(**given, impl=impl), attend_ranges(**strided, impl=impl), strict=True
    ):
        assert torch.equal(x, y)


@pytest.mark.parametrize("impl", ["reference", "numba"])
def test_the_start_of_an_unused_range_is_free(impl):
    clean = put("lengths", (0, 0, 1), 0)
    wild = put("starts", (0, 0, 1), -(2**31))
    for x, y in zip(
        attend_ranges(**inputs(**clean), impl=impl),
        attend_ranges(**inputs(**clean, **wild), impl=impl),
        strict=True,
    ):
        assert torch.equal(x, y)


def test_the_reference_refuses_ranges_that_overlap():
    given = inputs(**put("starts", (1, 0, 1), 5))
    with pytest.raises(
        ValueError, match=r"overlap; got \[0, 10\) and \[5, 15\) in batch 1, row 0"
    ):
        attend_ranges(**given, impl="reference")


def test_range_values_are_checked_elsewhere_only_under_the_debug_flag(monkeypatch):
    """Reading them on another device waits for it. The meta device has no values to look at."""
    given = {name: x.to("meta") for name, x in inputs(**put("lengths", (0, 0, 0), -1)).items()}
    values = (given["starts"], given["lengths"], N)
    checked = []
    monkeypatch.setattr(validate, "check_range_values", lambda *x: checked.append(x[2]))
    validate.check_values(*values)
    assert checked == []
    monkeypatch.setenv("SAAP_DEBUG", "1")
    validate.check_values(*values)
    assert checked == [N]


@pytest.mark.parametrize(
    ("seqlens", "message"),
    [
        (
            torch.tensor([50, 50, 50], dtype=torch.int32),
            r"cache_seqlens must be \[B\] with B = 2; got \(3,\)",
        ),
        (torch.tensor([50, 50]), r"cache_seqlens must have dtype int32; got torch\.int64"),
        (torch.tensor([50, 51], dtype=torch.int32), r"at most N = 50; got .*= 51"),
        (torch.tensor([-1, 50], dtype=torch.int32), r"at least 0; got .*= -1"),
    ],
    ids=str,
)
@pytest.mark.parametrize("impl", IMPLS)
def test_refused_sequence_lengths(seqlens, message, impl):
    given = inputs()
    with pytest.raises(ValueError, match=message):
        attend_dense(given["q"], given["k"], given["v"], seqlens, impl=impl)


@pytest.mark.parametrize(
    ("prefix", "message"),
    [
        (empty(1, 2, 7, 32), r"prefix_k must be .*Hkv = 2 and D = 32; got \(1, 2, 7, 32\)"),
        (empty(3, 7, 32), r"prefix_k must be .*Hkv = 2 and D = 32; got \(3, 7, 32\)"),
        (
            empty(2, 7, 32).half(),
            r"prefix_k must be like k, torch\.float32 .*; got torch\.float16",
        ),
        (empty(2, 7, 32, device="meta"), "prefix_k must be like k, .*on cpu; got .*on meta"),
    ],
    ids=str,
)
def test_refused_prefixes(prefix, message):
    given = inputs()
    with pytest.raises(ValueError, match=message):
        attend_shared_prefix(given.pop("q"), prefix, prefix, **given)


STATE = (empty(2, 4, 32), empty(2, 4))


@pytest.mark.parametrize(
    ("states", "message"),
    [
        (
            (*STATE, empty(2, 5, 32), empty(2, 5)),
            r"out_b must be like out_a, .*\(2, 4, 32\); got .*\(2, 5, 32\)",
        ),
        (
            (*STATE, STATE[0].half(), STATE[1]),
            r"out_b must be like out_a, torch\.float32 .*; got torch\.float16",
        ),
        (
            (*STATE, STATE[0], empty(2, 4, 1)),
            r"lse_b must have the shape of .*\(2, 4\); got \(2, 4, 1\)",
        ),
        ((*STATE, STATE[0], STATE[1].half()), r"got lse_b of torch\.float16"),
        (
            (STATE[0].int(), STATE[1], *STATE),
            r"out_a must have a floating-point dtype; got torch\.int32",
        ),
        ((*STATE, *(x.to("meta") for x in STATE)), "out_b must be on cpu, as out_a; got meta"),
    ],
    ids=range(6),
)
def test_refused_states(states, message):
    with pytest.raises(ValueError, match=message):
        merge_states(*states)
