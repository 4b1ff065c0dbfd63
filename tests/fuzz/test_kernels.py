"""Hostile inputs of the kernels: refused by a ValueError, or answered as the reference does."""

import pytest
import torch

import saap
from saap.kernels.attention import quantize_rows
from saap.kernels.attention.int8_rows import widened
from saap.kernels.codes import QueryMap, encode, select_rows

from ..torch_threads import torch_threads
from .hostile import DTYPES, canaries, cases, torch_seed

pytestmark = pytest.mark.bad_input
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float64: 2e-5,
             torch.int8: 2e-5}  # fmt: skip
INT32 = 2**31 - 1
SCALES = (-1, 0, 1, 60, 62, -66)  # as four bytes: NaN, 0, 2e-38, 0.01, 0.2, -0.2


def strange(own, x):
    """The same kind of tensor in another layout, or with values that are no numbers."""
    kind = own.randrange(12)
    if kind == 0 and x.ndim > 2:
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if kind == 1:
        return torch.cat([x, x], -1)[..., : x.shape[-1]]
    if kind == 2:
        return torch._neg_view(-x)
    if kind == 3 and x.numel():
        x = x.clone()
        flat = x.view(-1)
        flat[own.randrange(x.numel())] = own.choice((torch.nan, torch.inf, -torch.inf, 6e4))
    if kind == 4:
        return x * own.choice((0.0, 1e-30, 1e3))
    if kind == 5 and x.ndim > 2:
        return x[:, :, :1].expand_as(x) if x.shape[2] else x
    return x


def strange_rows(own, x):
    """int8 rows in another layout, or with a scale that `quantize_rows` does not write."""
    kind = own.randrange(6)
    if kind == 0:
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if kind == 1:
        return torch.cat([x, x], -1)[..., : x.shape[-1]]
    if kind == 2 and x.numel():
        at = own.randrange(x.numel() // x.shape[-1])
        x.view(-1, x.shape[-1])[at, -4:] = torch.tensor([own.choice(SCALES)] * 4)
    return x


def ranges(own, batch, rows, n):
    """`starts, lengths [batch, rows, R]`, most of them sorted and apart, some with nonsense."""
    count = own.choice((0, 1, 1, 2, 3, 7))
    starts = torch.zeros(batch, rows, count, dtype=torch.int32)
    lengths = torch.zeros_like(starts)
    for b in range(batch):
        for row in range(rows):
            edges = sorted(own.randrange(n + 1) for _ in range(2 * count))
            for i in range(count):
                starts[b, row, i] = edges[2 * i]
                lengths[b, row, i] = edges[2 * i + 1] - edges[2 * i]
    if count and own.random() < 0.15:
        place = own.randrange(batch), own.randrange(rows), own.randrange(count)
        which = own.choice((starts, lengths))
        which[place] = own.choice((-1, -INT32 - 1, INT32, n, n + 1, -n - 1, INT32 - n))
    return starts, lengths


def attention_case(own):
    batch, n_kv = own.choice((1, 1, 2, 3)), own.choice((1, 2, 3))
    group, dim = own.choice((1, 2, 4, 5, 19)), own.choice((16, 32, 48, 64, 128, 8, 1, 17))
    n = own.choice((0, 1, 2, 15, 16, 17, 63, 64, 65, 200))
    dtype = own.choice(DTYPES[:3])
    generator = torch_seed(own)
    q, k, v = (
        strange(own, torch.randn(*shape, generator=generator).to(dtype))
        for shape in ((batch, n_kv * group, dim), *[(batch, n_kv, n, dim)] * 2)
    )
    if own.random() < 0.2:
        k, v = (strange_rows(own, quantize_rows(t)) for t in (k, v))
    starts, lengths = ranges(own, batch, own.choice((n_kv, n_kv * group)), n)
    given = {"q": q, "k": k, "v": v, "starts": starts, "lengths": lengths}
    if own.random() < 0.1:  # one argument of another shape, dtype or kind
        name = own.choice(sorted(given))
        old = given[name]
        given[name] = own.choice(
            (old[..., :-1], old[:1], old.long(), old.double(), old[None], old.bool(),
             old.to("meta"), None)
        )  # fmt: skip
    options = {"sm_scale": own.choice((None,) * 9 + (0.0, 1.0, -2.0, 1e30, float("nan"))),
               "softcap": own.choice((None,) * 9 + (5.0, 5.0, 0.0, float("inf"), -1))}  # fmt: skip
    return given, options


def answer(given, options, impl):
    try:
        return saap.attend_ranges(**given, **options, impl=impl)
    except (ValueError, TypeError) as error:
        assert str(error), error
        return str(error) if "overlap" in str(error) else None


def test_attend_ranges():
    for own, counts in cases("attend_ranges", 400):
        given, options = attention_case(own)
        inputs = {name: t for name, t in given.items() if t is not None and not t.is_meta}
        before = {name: t.clone() for name, t in inputs.items()}
        with canaries():
            found = answer(given, options, None)
            if isinstance(found, tuple):
                found = tuple(t.clone() for t in found)
        true = answer(given, options, "reference")
        if isinstance(true, str) or isinstance(found, str):  # not all backends look for it
            counts["overlapping"] = counts.get("overlapping", 0) + 1
            continue
        assert (found is None) == (true is None)
        for name, t in inputs.items():
            assert torch.equal(t.nan_to_num(7e4), before[name].nan_to_num(7e4)), name
        counts["refused"] = counts.get("refused", 0) + (found is None)
        if found is None:
            continue
        limit = TOLERANCE[given["q"].dtype] + TOLERANCE[given["k"].dtype]
        # A score is known to its size in units of rounding, and so is its weight.
        scores = true[1][true[1].isfinite()].abs().flatten().tolist()
        limit += 2 * torch.finfo(torch.float32).eps * max(scores, default=0)
        values = widened(given["v"], torch.float64)
        for got, exact, name in zip(found, true, ("out", "lse"), strict=True):
            if abs(options["sm_scale"] or 1.0) > 1e3 or "e3" in str(options):
                continue  # scores overflow to infinities in another order
            no_number = exact.isnan() | exact.isposinf()
            assert torch.equal(got.isnan() | got.isposinf(), no_number), name
            if name == "lse":  # an infinite value times a weight of nearly 0 may be either
                assert torch.equal(got.isnan(), exact.isnan())
            got, exact = got.double(), exact.double()
            same = (got == exact) | no_number
            # Errors of the weights count by the values, which may cancel in the sum.
            of = values if name == "out" else exact
            scale = 1 + max(torch.where(of.isfinite(), of.abs(), 0).flatten().tolist(), default=0)
            assert bool((same | ((got - exact).abs() <= limit * scale)).all()), name


def test_select_rows():
    for own, counts in cases("select_rows", 150):
        batch, n_kv = own.choice((1, 1, 2)), own.choice((1, 2, 3))
        group, coordinates = own.choice((1, 2, 4, 5)), own.choice((64, 128, 192))
        n = own.choice((1, 2, 63, 64, 65, 300, 1000))
        generator = torch_seed(own)
        x = strange(own, torch.randn(batch, n_kv, n, coordinates, generator=generator))
        codes = encode(x, torch.ones(1, n_kv, coordinates))
        q = torch.randn(batch, n_kv * group, coordinates, generator=generator)
        q = strange(own, q * own.choice((0.0, 1e-30, 0.1, 1.0, 30.0, 1e20)))
        n_rows = [own.choice((0, 1, n, own.randrange(n + 1))) for _ in range(batch)]
        most = own.choice((0, 1, 5, n - 1, n, n + 9, INT32))
        query_map = None
        if own.random() < 0.5:
            dim, maps = own.choice((1, 48, coordinates)), own.choice((1, batch))
            matrix = torch.randn(maps, n_kv, coordinates, dim, generator=generator)
            query_map = QueryMap.of(matrix * own.choice((0.0, 1e-30, 1.0, 1e20)))
            q = q[..., :dim].contiguous()
        options = {
            "query_map": query_map, "max_tokens": most,
            "n_candidates": own.choice((0, most, most + 3, n, INT32)),
            "share": own.choice(("group", "head")), "first_row": own.choice((0, 4, 1000)),
            "min_weight": own.choice((None, None, 1e-40, 1e-3, 0.3, 1e30)),
        }  # fmt: skip
        if own.random() < 0.5:
            options["outside"] = strange(own, 9 * torch.randn(q.shape[:2], generator=generator))
        if own.random() < 0.2:
            wrong = own.choice(
                (
                    {"max_tokens": -1},
                    {"min_weight": -1.0},
                    {"n_candidates": -2},
                    {"share": "x"},
                    {"max_tokens": 2**70},
                    {"query_map": QueryMap.of(torch.ones(1, n_kv, coordinates + 64, 8))},
                    {"query_map": QueryMap(torch.ones(1, n_kv, 8, coordinates), torch.ones(1))},
                )
            )
            options |= wrong
            if own.random() < 0.5:
                n_rows = own.choice(([n + 1] * batch, [-1] * batch, n_rows * 2, []))
        try:
            with canaries(), torch_threads(own.choice((1, 2, 3, 5))):
                starts, lengths = (t.clone() for t in select_rows(q, codes, n_rows, **options))
        except ValueError:
            counts["refused"] = counts.get("refused", 0) + 1
            continue
        first = options["first_row"]
        for i, rows in enumerate(n_rows if batch > 1 else n_rows * len(q)):
            for h in range(starts.shape[1]):
                pairs = zip(starts[i, h].tolist(), lengths[i, h].tolist(), strict=True)
                chosen = [row for s, m in pairs for row in range(s - first, s - first + m)]
                most = min(options["max_tokens"], rows)
                if options["min_weight"] is None:
                    assert len(chosen) == most, (chosen, rows)
                assert len(chosen) <= most
                assert chosen == sorted(set(chosen))
                assert not chosen or (chosen[0] >= 0 and chosen[-1] < rows)
