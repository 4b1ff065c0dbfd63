"""Device code of the schedule: ranges to slots, slots to tiles, tiles to programs.

A *group* is the query heads that share one list of ranges. A *slot* is a place in the
concatenation of a group's ranges; a *tile* is `BLOCK_N` consecutive slots, so that every tile of
a group but its last is full however short the ranges are. The tiles of all groups laid end to
end are divided evenly over a fixed number of *programs*: the stream-K of LeanAttention (arXiv
2405.10480), where a program may begin inside one group and end inside another.

Lengths and counts are runtime values; nothing here needs the host.
"""

import triton
import triton.language as tl

NO_BOUND = tl.constexpr(2147483647)


@triton.jit
def first_tile_of(program, tiles, programs):
    """First tile of a program: the first `tiles % programs` of them have one tile more."""
    return program * (tiles // programs) + tl.minimum(program, tiles % programs)


@triton.jit
def program_of(tile, tiles, programs):
    """The inverse of `first_tile_of`."""
    fewer = tiles // programs
    longer = tiles % programs
    boundary = longer * (fewer + 1)
    return tl.where(
        tile < boundary,
        tile // (fewer + 1),
        longer + (tile - boundary) // tl.maximum(fewer, 1),
    )


@triton.jit(
    do_not_specialize=[
        *("starts_batch", "starts_head", "lengths_batch", "lengths_head", "heads", "n_ranges"),
    ]
)
def pack_ranges(
    starts,  # int32 [B, heads, n_ranges]
    lengths,
    bounds,  # int32 [n_groups, n_ranges]: first slot of each range in use
    shifts,  # int32 [n_groups, n_ranges]: its first row minus its first slot
    slots,  # int32 [n_groups]: selected rows
    used,  # int32 [n_groups]: ranges in use
    starts_batch,
    starts_head,
    starts_range,
    lengths_batch,
    lengths_head,
    lengths_range,
    heads,
    n_ranges,
    RANGE_BLOCK: tl.constexpr,
):
    """Drops unused ranges and turns the rest into slots: the prefix sum of a group's ranges."""
    group = tl.program_id(0)
    batch = (group // heads).to(tl.int64)
    head = group % heads
    starts += batch * starts_batch + head * starts_head
    lengths += batch * lengths_batch + head * lengths_head
    bounds += group.to(tl.int64) * n_ranges
    shifts += group.to(tl.int64) * n_ranges
    next_slot = 0
    next_range = 0
    for base in range(0, n_ranges, RANGE_BLOCK):
        index = base + tl.arange(0, RANGE_BLOCK)
        start = tl.load(starts + index * starts_range, mask=index < n_ranges, other=0)
        length = tl.load(lengths + index * lengths_range, mask=index < n_ranges, other=0)
        length = tl.maximum(length, 0)
        in_use = length > 0
        first = next_slot + tl.cumsum(length, 0) - length
        place = next_range + tl.cumsum(in_use.to(tl.int32), 0) - 1
        tl.store(bounds + place, first, mask=in_use)
        tl.store(shifts + place, start - first, mask=in_use)
        next_slot += tl.sum(length, 0)
        next_range += tl.sum(in_use.to(tl.int32), 0)
    tl.store(slots + group, next_slot)
    tl.store(used + group, next_range)


@triton.jit
def _group_tiles(slots, slots_batch, slots_head, group, n_groups, heads, BLOCK_N: tl.constexpr):
    batch = (group // heads).to(tl.int64)
    count = tl.load(
        slots + batch * slots_batch + (group % heads) * slots_head,
        mask=group < n_groups,
        other=0,
    )
    return tl.cdiv(tl.maximum(count, 0), BLOCK_N)


@triton.jit
def find_share(
    slots,
    slots_batch,
    slots_head,
    tile_offsets,  # int32 [n_groups + 1], written by program 0 for `combine_parts`
    n_groups,
    heads,
    program,
    programs,
    BLOCK_N: tl.constexpr,
    GROUPS_BLOCK: tl.constexpr,
):
    """The tiles `[begin, end)` of a program, the group of the first and that group's first tile.

    Searches the prefix sum by counting: one vector load reaches 512 groups, where a binary
    search is nine loads that wait for each other.
    """
    tiles = 0
    for base in range(0, n_groups, GROUPS_BLOCK):
        index = base + tl.arange(0, GROUPS_BLOCK)
        count = _group_tiles(slots, slots_batch, slots_head, index, n_groups, heads, BLOCK_N)
        tiles += tl.sum(count, 0)
    begin = first_tile_of(program, tiles, programs)
    end = first_tile_of(program + 1, tiles, programs)
    offset = 0
    group = 0
    group_tile = 0
    for base in range(0, n_groups, GROUPS_BLOCK):
        index = base + tl.arange(0, GROUPS_BLOCK)
        count = _group_tiles(slots, slots_batch, slots_head, index, n_groups, heads, BLOCK_N)
        stop = offset + tl.cumsum(count, 0)
        before = (stop <= begin) & (index < n_groups)
        group += tl.sum(before.to(tl.int32), 0)
        group_tile += tl.sum(tl.where(before, count, 0), 0)
        if program == 0:
            tl.store(tile_offsets + index, stop - count, mask=index < n_groups)
        offset += tl.sum(count, 0)
    if program == 0:
        tl.store(tile_offsets + n_groups, tiles)
    return begin, end, group, group_tile


@triton.jit
def find_range(bounds, n_used, slot, RANGE_BLOCK: tl.constexpr):
    """The last range that begins at or before a slot."""
    count = 0
    for base in range(0, n_used, RANGE_BLOCK):
        index = base + tl.arange(0, RANGE_BLOCK)
        bound = tl.load(bounds + index, mask=index < n_used, other=NO_BOUND)
        count += tl.sum((bound <= slot).to(tl.int32), 0)
    return tl.maximum(count - 1, 0)


@triton.jit
def _bit_count(x):
    """Ones in each uint32; the form that LLVM turns into one instruction."""
    x -= (x >> 1) & 0x55555555
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def tile_rows(bounds, shifts, n_used, current, slot, BLOCK_N: tl.constexpr):
    """Rows of the `BLOCK_N` slots from `slot` on, given its range; the range of the next tile.

    At most `BLOCK_N` ranges begin after `slot` and up to the next tile's first slot. One bit
    marks where each begins; a slot's range is the number of bits before it.
    """
    lanes = tl.arange(0, BLOCK_N)
    words = tl.arange(0, BLOCK_N // 32)
    index = current + 1 + lanes
    bound = tl.load(bounds + index, mask=index < n_used, other=NO_BOUND)
    ahead = bound - slot - 1
    bits = tl.where((ahead >> 5)[None, :] == words[:, None], (1 << (ahead & 31))[None, :], 0)
    marks = tl.sum(bits, 1).to(tl.uint32)
    below = lanes[:, None] - 32 * words[None, :]
    below = tl.minimum(tl.maximum(below, 0), 32)
    taken = tl.where(below == 32, -1, (1 << (below & 31)) - 1).to(tl.uint32)
    begun = tl.sum(_bit_count(marks[None, :] & taken), 1)
    rows = slot + lanes + tl.load(shifts + current + begun)
    return rows, current + tl.sum(_bit_count(marks), 0)
