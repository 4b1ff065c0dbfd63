"""The largest of many numbers on a GPU, without sorting: digits are counted, rows moved together.

A number, in an order-preserving form, is taken as digits; passes count them, one digit after the
other (radix selection), until the k-th largest is known. Rows at or above it are written one after
the other, in their order, by sums over the blocks before. Nothing waits for the host, and results
are the same from run to run: counts are whole numbers, and no place depends on which program was
first. A digit has few bits, since counting takes time in proportion to how many digits there are.
"""

import triton
import triton.language as tl


@triton.jit
def _ordered(x):
    """Whole numbers in the order of floats that are not below 0, or of numbers of 16 bits."""
    if x.dtype == tl.float32:
        return x.to(tl.int32, bitcast=True)
    else:
        return x.to(tl.int32) + 32768


@triton.jit
def kth_largest(counts, head, n_heads, k, PASSES: tl.constexpr, BITS: tl.constexpr):
    """The digits of the k-th largest that so many passes have counted, and how many of the numbers
    that share them are among the k; all 0 where there are fewer numbers than k.

    counts: int32 `[passes, n_heads, 2 ** BITS]`.
    """
    digit = tl.arange(0, 1 << BITS)
    found, left = 0, k
    for number in tl.static_range(PASSES):
        own = tl.load(counts + ((number * n_heads + head) << BITS) + digit)
        from_here = tl.sum(own, 0) - tl.cumsum(own, 0) + own
        at = tl.max(tl.where(from_here >= left, digit, 0), 0)
        left -= tl.sum(tl.where(digit == at, from_here - own, 0), 0)
        found = (found << BITS) | at
    return found, left


@triton.jit
def count_digits(
    numbers, in_use, counts, k, room, per_use,
    PASS: tl.constexpr, PASSES: tl.constexpr, BITS: tl.constexpr, EVERY: tl.constexpr,
    OWN_K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Counts the next digit of `numbers [heads, room]` that share those before with the k-th.

    in_use: int32, how many of a head's numbers count; one entry for `per_use` heads. k: a number,
    or, if `OWN_K`, int32 `[heads]`. Of `EVERY` numbers that follow one another one is looked at,
    its place a hash: texts repeat themselves.
    """
    head, n_heads = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    wanted = tl.load(k + head) if OWN_K else k
    held = tl.load(in_use + head // per_use)
    if tl.program_id(0) * (BLOCK * EVERY) >= held:
        return
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if EVERY > 1:
        i = i * EVERY + ((i * 40503) >> 7) % EVERY
    key = _ordered(tl.load(numbers + head * room + i, i < held, other=0))
    counted = i < held
    if PASS > 0:
        found, _ = kth_largest(counts, head, n_heads, wanted, PASS, BITS)
        counted = counted & ((key >> ((PASSES - PASS) * BITS)) == found)
    digit = (key >> ((PASSES - 1 - PASS) * BITS)) & ((1 << BITS) - 1)
    own = tl.histogram(digit, 1 << BITS, mask=counted)
    place = counts + ((PASS * n_heads + head) << BITS) + tl.arange(0, 1 << BITS)
    tl.atomic_add(place, own, own > 0, sem="relaxed")


@triton.jit
def find_kth(
    counts, kth, k, PASSES: tl.constexpr, BITS: tl.constexpr, OWN_K: tl.constexpr
):  # fmt: skip
    """`kth [2, heads]`: the k-th largest in the order of `_ordered`; how many like it count."""
    head, n_heads = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    wanted = tl.load(k + head) if OWN_K else k
    found, left = kth_largest(counts, head, n_heads, wanted, PASSES, BITS)
    tl.store(kth + head, found)
    tl.store(kth + n_heads + head, left)


@triton.jit
def _passing(scores, kth, task, group, room, i, held, BLOCK: tl.constexpr):
    """Which rows are among the k best of any head."""
    found = tl.zeros([BLOCK], dtype=tl.int32)
    for h in range(group):
        head = task * group + h
        least = tl.load(kth + head)
        key = _ordered(tl.load(scores + head * room + i, i < held, other=0))
        found = found | (key >= least).to(tl.int32)
    return found & (i < held).to(tl.int32)


@triton.jit
def count_passing(
    scores, kth, in_use, per_block, group, room, n_blocks, BLOCK: tl.constexpr,
):  # fmt: skip
    """`per_block[task, block]`: rows of a block that are among the k best of any of the heads."""
    task = tl.program_id(1).to(tl.int64)
    held = tl.load(in_use + task)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    passing = _passing(scores, kth, task, group, room, i, held, BLOCK)
    tl.store(per_block + task * n_blocks + tl.program_id(0), tl.sum(passing, 0))


@triton.jit
def _before(per_block, block, BLOCKS: tl.constexpr):
    i = tl.arange(0, BLOCKS)
    return tl.sum(tl.load(per_block + i, i < block, other=0), 0)


@triton.jit
def list_passing(
    scores, kth, in_use, per_block, listed, n_listed, group, room, list_room, n_blocks,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """`listed[task]`: those rows, ascending; `n_listed[task]`: how many, at most `list_room`."""
    task, block = tl.program_id(1).to(tl.int64), tl.program_id(0)
    held = tl.load(in_use + task)
    i = block * BLOCK + tl.arange(0, BLOCK)
    passing = _passing(scores, kth, task, group, room, i, held, BLOCK)
    before = _before(per_block + task * n_blocks, block, BLOCKS)
    place = before + tl.cumsum(passing, 0) - 1
    tl.store(listed + task * list_room + place, i, (passing > 0) & (place < list_room))
    if block == n_blocks - 1:
        tl.store(n_listed + task, tl.minimum(before + tl.sum(passing, 0), list_room))


@triton.jit
def sum_blocks(
    scores, in_use, maxima, sums, room, group, n_blocks, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of each block of a head's scores the largest, and the sum of powers of e relative to it."""
    head, block = tl.program_id(1).to(tl.int64), tl.program_id(0)
    held = tl.load(in_use + head // group)
    i = block * BLOCK + tl.arange(0, BLOCK)
    score = tl.load(scores + head * room + i, i < held, other=-float("inf"))
    largest = tl.max(score, 0)
    shifted = tl.where(largest == -float("inf"), score, score - largest)
    tl.store(maxima + head * n_blocks + block, largest)
    tl.store(sums + head * n_blocks + block, tl.sum(tl.exp(shifted), 0))


@triton.jit
def add_weights(
    scores, in_use, maxima, sums, outside, weights, room, group, n_blocks,
    OUTSIDE: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """`weights[task, i]`: the softmax of the heads' scores, beside what is `outside`, added up."""
    task, block = tl.program_id(1).to(tl.int64), tl.program_id(0)
    held = tl.load(in_use + task)
    if block * BLOCK >= held:
        return
    i = block * BLOCK + tl.arange(0, BLOCK)
    j = tl.arange(0, BLOCKS)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for h in range(group):
        head = task * group + h
        maximum = tl.load(maxima + head * n_blocks + j, j < n_blocks, other=-float("inf"))
        largest = tl.max(maximum, 0)
        if OUTSIDE:
            beside = tl.load(outside + head)
            beside = tl.where(beside == beside, beside, -float("inf"))
            largest = tl.maximum(largest, beside)
        sizes = tl.load(sums + head * n_blocks + j, j < n_blocks, other=0.0)
        size = tl.sum(
            tl.where(maximum == -float("inf"), 0.0, sizes * tl.exp(maximum - largest)), 0
        )
        if OUTSIDE:
            size += tl.exp(beside - largest)
        score = tl.load(scores + head * room + i, i < held, other=-float("inf"))
        weight = tl.exp(score - largest) / size
        total += tl.where(weight == weight, weight, 0.0)
    tl.store(weights + task * room + i, total, i < held)


@triton.jit
def _chosen(weights, kth, task, n_tasks, least, room, i, held):
    """Which rows are above the k-th, and which are like it; how many of the latter count."""
    at, left = tl.load(kth + task), tl.load(kth + n_tasks + task)
    weight = tl.load(weights + task * room + i, i < held, other=0.0)
    enough = (i < held) & (weight >= least)
    key = _ordered(weight)
    return (enough & (key > at)).to(tl.int32), (enough & (key == at)).to(tl.int32), left


@triton.jit
def count_chosen(
    weights, kth, in_use, per_block, least, room, n_blocks, BLOCK: tl.constexpr,
):  # fmt: skip
    """`per_block[0 or 1, task, block]`: rows of a block that `_chosen` tells of."""
    task, n_tasks = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    held = tl.load(in_use + task)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    above, equal, _ = _chosen(weights, kth, task, n_tasks, least, room, i, held)
    own = per_block + task * n_blocks + tl.program_id(0)
    tl.store(own, tl.sum(above, 0))
    tl.store(own + n_tasks * n_blocks, tl.sum(equal, 0))


@triton.jit
def list_chosen(
    weights, kth, in_use, per_block, listed, rows, n_rows, k, least, room, n_blocks,
    LISTED: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """`rows[task]`: the chosen ones, ascending, of those that are equal the first; `n_rows[task]`:
    how many."""
    task, n_tasks, block = tl.program_id(1).to(tl.int64), tl.num_programs(1), tl.program_id(0)
    held = tl.load(in_use + task)
    i = block * BLOCK + tl.arange(0, BLOCK)
    above, equal, left = _chosen(weights, kth, task, n_tasks, least, room, i, held)
    own = per_block + task * n_blocks
    above_before = _before(own, block, BLOCKS)
    equal_before = _before(own + n_tasks * n_blocks, block, BLOCKS)
    rank = equal_before + tl.cumsum(equal, 0) - equal
    taken = above | (equal & (rank < left).to(tl.int32))
    place = above_before + tl.minimum(equal_before, left) + tl.cumsum(taken, 0) - 1
    row = i
    if LISTED:
        row = tl.load(listed + task * room + i, i < held, other=0)
    tl.store(rows + task * k + place, row, (taken > 0) & (place < k))
    if block == n_blocks - 1:
        total = above_before + tl.minimum(equal_before, left) + tl.sum(taken, 0)
        tl.store(n_rows + task, tl.minimum(total, k))


@triton.jit
def leave_out(
    scores, weights, kth, in_use, left_out, least, room, group, BLOCK: tl.constexpr,
):  # fmt: skip
    """`left_out[head]`: the log-sum-exp of a head's scores with the rows that are not chosen."""
    head, n_tasks = tl.program_id(0).to(tl.int64), tl.num_programs(0) // group
    task = head // group
    held = tl.load(in_use + task)
    largest = tl.full([], float("-inf"), tl.float32)
    total = tl.full([], 0.0, tl.float32)
    before = tl.full([], 0, tl.int32)
    for first in range(0, held, BLOCK):
        i = first + tl.arange(0, BLOCK)
        above, equal, left = _chosen(weights, kth, task, n_tasks, least, room, i, held)
        rank = before + tl.cumsum(equal, 0) - equal
        taken = above | (equal & (rank < left).to(tl.int32))
        others = (i < held) & (taken == 0)
        score = tl.load(scores + head * room + i, others, other=-float("inf"))
        new = tl.maximum(largest, tl.max(score, 0))
        shift = tl.where(new == -float("inf"), 0.0, new)
        total = total * tl.exp(largest - shift) + tl.sum(tl.exp(score - shift), 0)
        largest = new
        before += tl.sum(equal, 0)
    tl.store(left_out + head, tl.where(total > 0, largest + tl.log(total), -float("inf")))


@triton.jit
def as_ranges(
    rows, n_rows, begins, starts, lengths, scored, in_use, first_row, k, capacity, heads,
    starts_batch, starts_head, lengths_batch, lengths_head, BLOCK: tl.constexpr,
):  # fmt: skip
    """Ascending rows as runs `starts, lengths [n, heads, capacity]`, 0 where there is none.

    begins: int32 `[tasks, k + 1]` to work in.
    """
    task = tl.program_id(0).to(tl.int64)
    n = tl.load(n_rows + task)
    starts += task // heads * starts_batch + task % heads * starts_head
    lengths += task // heads * lengths_batch + task % heads * lengths_head
    rows += task * k
    begins += task * (k + 1)
    runs = 0
    for first in range(0, n, BLOCK):
        i = first + tl.arange(0, BLOCK)
        row = tl.load(rows + i, i < n, other=0)
        before = tl.load(rows + i - 1, (i > 0) & (i < n), other=-2)
        begin = ((i < n) & (row != before + 1)).to(tl.int32)
        place = runs + tl.cumsum(begin, 0) - 1
        tl.store(starts + place, row + first_row, begin > 0)
        tl.store(begins + place, i, begin > 0)
        runs += tl.sum(begin, 0)
    tl.store(begins + runs, n)
    tl.debug_barrier()
    for first in range(0, capacity, BLOCK):
        i = first + tl.arange(0, BLOCK)
        used = i < runs
        length = tl.load(begins + i + 1, used, other=0) - tl.load(begins + i, used, other=0)
        tl.store(lengths + i, length, i < capacity)
        tl.store(starts + i, tl.zeros([BLOCK], dtype=tl.int32), (i < capacity) & (i >= runs))
    tl.store(scored + task, tl.load(in_use + task).to(tl.int64))
