"""Rows of a file in slots: what is found, what is read, and what has to go."""

import pytest
import torch

from saap.kernels.slots import Slots, fetch

HEADS, WIDTH, ROWS = 3, 4, 200
IMPLS = ("reference", "numba")


@pytest.fixture
def rows_file(tmp_path):
    """`[ROWS, HEADS, WIDTH]` float32 behind 16 bytes."""
    content = torch.arange(ROWS * HEADS * WIDTH, dtype=torch.float32).view(ROWS, HEADS, WIDTH)
    path = tmp_path / "rows"
    path.write_bytes(b"x" * 16 + content.numpy().tobytes())
    with open(path, "rb") as file:
        yield content, file.fileno()


def places(file):
    return {
        "file": file, "first_byte": 16, "record_bytes": 4 * HEADS * WIDTH,
        "head_bytes": 4 * WIDTH,
    }  # fmt: skip


def drawn(rng, lists, most):
    """Ranges that do not overlap, ascending, `most` rows in each list."""
    starts = torch.zeros(lists, most, dtype=torch.int32)
    lengths = torch.zeros_like(starts)
    for number in range(lists):
        chosen = torch.randperm(ROWS // 4, generator=rng)[: most // 2].sort().values
        starts[number, : len(chosen)] = 4 * chosen
        lengths[number, : len(chosen)] = torch.randint(0, 3, (len(chosen),), generator=rng)
    return starts, lengths


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("per_head", [1, 3])
def test_slots_hold_what_is_asked_for(rows_file, impl, per_head):
    content, file = rows_file
    rng = torch.Generator().manual_seed(per_head)
    slots = Slots.of(torch.full((HEADS, 70, WIDTH), torch.nan), ROWS)
    n_read = 0
    for _ in range(30):
        starts, lengths = drawn(rng, HEADS * per_head, 20)
        where, counts, read = fetch(slots, starts, lengths, impl=impl, **places(file))
        n_read += read
        for number in range(len(starts)):
            head = number // per_head
            wanted = torch.cat([
                content[s : s + n, head]
                for s, n in zip(starts[number].tolist(), lengths[number].tolist(), strict=True)
            ])  # fmt: skip
            found = torch.cat([
                slots.rows[head, s : s + n]
                for s, n in zip(where[number].tolist(), counts[number].tolist(), strict=True)
            ])  # fmt: skip
            assert torch.equal(found, wanted)
        held = slots.row_in >= 0
        assert (slots.slot_of >= 0).sum() == held.sum()
    assert 0 < n_read < 30 * HEADS * per_head * 20


def test_both_backends_hold_the_same(rows_file):
    _, file = rows_file
    both = [Slots.of(torch.zeros(HEADS, 45, WIDTH), ROWS) for _ in IMPLS]
    rng = torch.Generator().manual_seed(5)
    for _ in range(40):
        asked = drawn(rng, 2 * HEADS, 20)
        found = [
            fetch(slots, *asked, impl=impl, **places(file))
            for slots, impl in zip(both, IMPLS, strict=True)
        ]
        assert found[0][2] == found[1][2]
        assert all(torch.equal(a, b) for a, b in zip(found[0][:2], found[1][:2], strict=True))
        for name in ("rows", "slot_of", "row_in", "used", "spared", "hands"):
            assert torch.equal(*(getattr(slots, name) for slots in both)), name


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_that_come_again_are_not_read_again(rows_file, impl):
    _, file = rows_file
    slots = Slots.of(torch.zeros(HEADS, 40, WIDTH), ROWS)
    hot = torch.arange(10, dtype=torch.int32).expand(HEADS, 10).contiguous()
    ones = torch.ones_like(hot)
    assert fetch(slots, hot, ones, impl=impl, **places(file))[2] == 10 * HEADS
    for step in range(10):  # others pass through, what is asked for every time stays
        cold = torch.arange(100 + 9 * step, 109 + 9 * step, dtype=torch.int32)
        asked = torch.cat([hot, cold.expand(HEADS, 9)], 1)
        assert fetch(slots, asked, torch.ones_like(asked), impl=impl, **places(file))[2] == 27
    slots.forget(0, 4)
    assert fetch(slots, hot, ones, impl=impl, **places(file))[2] == 4 * HEADS


@pytest.mark.parametrize("impl", IMPLS)
def test_a_row_that_cannot_be_read_is_named_and_not_kept(rows_file, impl, tmp_path):
    content, file = rows_file
    slots = Slots.of(torch.zeros(HEADS, 40, WIDTH), ROWS + 5)
    asked = torch.tensor([[3, ROWS]] * HEADS, dtype=torch.int32)
    with pytest.raises(OSError, match=f"ends before row {ROWS}"):
        fetch(slots, asked, torch.ones_like(asked), impl=impl, **places(file))
    assert (slots.slot_of[:, ROWS] == -1).all()
    asked[:, 1] = 4
    where, _, _ = fetch(slots, asked, torch.ones_like(asked), impl=impl, **places(file))
    first = int(where[2, 0])
    assert torch.equal(slots.rows[2, first], content[3, 2])


@pytest.mark.bad_input
def test_what_is_refused(rows_file):
    _, file = rows_file
    slots = Slots.of(torch.zeros(HEADS, 4, WIDTH), ROWS)
    for starts, lengths, said in (
        ([[0]] * 3, [[5]] * 3, "at most 4 rows of a head; got 5"),
        ([[ROWS]] * 3, [[1]] * 3, f"must be in 0..{ROWS - 1}; got row {ROWS}"),
        ([[0]] * 2, [[1]] * 2, "a multiple of the 3 heads"),
    ):
        starts, lengths = (torch.tensor(t, dtype=torch.int32) for t in (starts, lengths))
        with pytest.raises(ValueError, match=said):
            fetch(slots, starts, lengths, **places(file))
