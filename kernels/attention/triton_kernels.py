"""Device code of LeanAttention (arXiv 2405.10480) over ragged lists of ranges.

The query heads of a group (see `triton_schedule` for the words) are the M dimension of `tl.dot`.
A group that lies in several programs is left as one *part* for each of them, which
`triton_combine` merges.
"""

import triton
import triton.language as tl

from .triton_schedule import find_range, find_share, tile_rows

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _tanh(x):
    """tanh through exp2; a series where the difference below would cancel."""
    size = tl.abs(x)
    decay = tl.exp2(size * (-2 * LOG2_E))
    square = x * x
    series = 62 / 2835
    series = series * square - 17 / 315
    series = series * square + 2 / 15
    series = series * square - 1 / 3
    series = size + size * square * series
    far = (1 - decay) / (1 + decay)
    value = tl.where(size < 0.25, series, far)
    return tl.where(x < 0, -value, value)


@triton.jit
def _attend_part(
    q,
    k,
    v,
    k_scale,
    v_scale,
    bounds,
    shifts,
    start,
    n_used,
    n_slots,
    tile_begin,
    tile_end,
    q_head,
    k_row,
    v_row,
    k_scale_row,
    v_scale_row,
    group_size,
    score_scale,
    softcap,
    HEAD_DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    RANGE_BLOCK: tl.constexpr,
    PACKED: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """Online softmax over the tiles `[tile_begin, tile_end)` of one group.

    Returns the normalised output `[GROUP_BLOCK, DIM_BLOCK]` and the base-2 log-sum-exp, fp32.
    """
    members = tl.arange(0, GROUP_BLOCK)
    dims = tl.arange(0, DIM_BLOCK)
    lanes = tl.arange(0, BLOCK_N)
    dim_in_use = dims < HEAD_DIM
    query = tl.load(
        q + members[:, None] * q_head + dims[None, :],
        mask=(members < group_size)[:, None] & dim_in_use[None, :],
        other=0.0,
    )
    top = tl.full([GROUP_BLOCK], float("-inf"), tl.float32)
    mass = tl.zeros([GROUP_BLOCK], tl.float32)
    acc = tl.zeros([GROUP_BLOCK, DIM_BLOCK], tl.float32)

    # The rows of a tile are known one iteration ahead: loads whose address waits for another
    # load of the same iteration would get half of the pipeline's buffers.
    first_slot = tile_begin * BLOCK_N
    if PACKED:
        current = find_range(bounds, n_used, first_slot, RANGE_BLOCK)
        rows, current = tile_rows(bounds, shifts, n_used, current, first_slot, BLOCK_N)
    else:
        rows = start + first_slot + lanes

    for tile in range(tile_begin, tile_end):
        slot = tile * BLOCK_N
        selected = slot + lanes < n_slots
        loaded = selected[:, None]
        if HEAD_DIM != DIM_BLOCK:
            loaded = loaded & dim_in_use[None, :]
        place = rows.to(tl.int64)[:, None]
        key = tl.load(k + place * k_row + dims[None, :], mask=loaded, other=0.0)
        value = tl.load(v + place * v_row + dims[None, :], mask=loaded, other=0.0)
        if k_scale is not None:
            key_scale = tl.load(
                k_scale + rows.to(tl.int64) * k_scale_row, mask=selected, other=0.0
            )
            value_scale = tl.load(
                v_scale + rows.to(tl.int64) * v_scale_row, mask=selected, other=0.0
            )
        if PACKED:
            rows, current = tile_rows(bounds, shifts, n_used, current, slot + BLOCK_N, BLOCK_N)
        else:
            rows += BLOCK_N

        scores = tl.dot(query, tl.trans(key.to(query.dtype)), input_precision="ieee")
        scores *= score_scale
        if k_scale is not None:
            scores *= key_scale[None, :]
        if SOFTCAP:
            scores = softcap * _tanh(scores)
        scores = tl.where(selected[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - new_top[:, None])
        keep = tl.exp2(top - new_top)
        mass = mass * keep + tl.sum(weights, 1)
        acc *= keep[:, None]
        if k_scale is not None:
            # Relative to the tile's largest, lest a small scale drown the weights in fp16.
            largest = tl.maximum(tl.max(value_scale, 0), 1e-30)
            weights *= (value_scale / largest)[None, :]
            acc += largest * tl.dot(
                weights.to(query.dtype), value.to(query.dtype), input_precision="ieee"
            )
        else:
            acc = tl.dot(weights.to(value.dtype), value, acc, input_precision="ieee")
        top = new_top
    return acc / mass[:, None], top + tl.log2(mass)


@triton.jit(
    do_not_specialize=[
        *("k_scale_batch", "k_scale_head", "k_scale_row"),
        *("v_scale_batch", "v_scale_head", "v_scale_row"),
        *("starts_batch", "starts_head", "slots_batch", "slots_head"),
        *("n_groups", "heads", "group_size", "heads_per_kv", "n_ranges", "programs"),
    ]
)
def attend_tiles(
    q,  # [B, Hq, HEAD_DIM]
    k,  # [B, Hkv, N, HEAD_DIM]
    v,
    k_scale,  # fp32 [B, Hkv, N] or None
    v_scale,
    starts,  # int32 [B, heads]: the one range of each group, if not PACKED
    slots,  # int32 [B, heads]
    bounds,  # from `pack_ranges`, if PACKED
    shifts,
    used,
    out,  # [B * Hq, HEAD_DIM]
    lse,  # fp32 [B * Hq]
    part_out,  # fp32 [2 * programs, group_size, HEAD_DIM], if SPLIT
    part_lse,  # fp32 [2 * programs, group_size], base 2
    tile_offsets,
    q_batch,
    q_head,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    k_scale_batch,
    k_scale_head,
    k_scale_row,
    v_scale_batch,
    v_scale_head,
    v_scale_row,
    starts_batch,
    starts_head,
    slots_batch,
    slots_head,
    n_groups,
    heads,
    group_size,
    heads_per_kv,
    n_ranges,
    programs,
    score_scale,
    softcap,
    HEAD_DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    RANGE_BLOCK: tl.constexpr,
    GROUPS_BLOCK: tl.constexpr,
    PACKED: tl.constexpr,
    SPLIT: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """Attention of every group over its slots; a group cut between programs is left in parts.

    SPLIT: stream-K over `programs`. Otherwise one program a group, and no parts.
    A program's parts are two at most: 0 for a group that an earlier program began, 1 for the
    group that it begins and a later one goes on with.
    """
    program = tl.program_id(0)
    if SPLIT:
        tile, end, group, group_tile = find_share(
            slots,
            slots_batch,
            slots_head,
            tile_offsets,
            n_groups,
            heads,
            program,
            programs,
            BLOCK_N,
            GROUPS_BLOCK,
        )
    else:
        group = program
        group_tile = 0
        tile = 0
        end = 1

    members = tl.arange(0, GROUP_BLOCK)
    dims = tl.arange(0, DIM_BLOCK)
    in_group = members < group_size
    stored = in_group[:, None] & (dims < HEAD_DIM)[None, :]
    cells = members[:, None] * HEAD_DIM + dims[None, :]
    while tile < end:
        batch = (group // heads).to(tl.int64)
        head = group % heads
        kv_head = (head // heads_per_kv).to(tl.int64)
        n_slots = tl.maximum(tl.load(slots + batch * slots_batch + head * slots_head), 0)
        n_tiles = tl.cdiv(n_slots, BLOCK_N)
        stop = tl.minimum(end, group_tile + n_tiles) if SPLIT else n_tiles
        head_row = group.to(tl.int64) * group_size
        if stop > tile:
            start = 0
            n_used = 0
            if PACKED:
                n_used = tl.load(used + group)
            else:
                start = tl.load(starts + batch * starts_batch + head * starts_head)
            k_scales = k_scale
            v_scales = v_scale
            if k_scale is not None:
                k_scales += batch * k_scale_batch + kv_head * k_scale_head
                v_scales += batch * v_scale_batch + kv_head * v_scale_head
            value, log_mass = _attend_part(
                q + batch * q_batch + (head * group_size).to(tl.int64) * q_head,
                k + batch * k_batch + kv_head * k_head,
                v + batch * v_batch + kv_head * v_head,
                k_scales,
                v_scales,
                bounds + group.to(tl.int64) * n_ranges if PACKED else bounds,
                shifts + group.to(tl.int64) * n_ranges if PACKED else shifts,
                start,
                n_used,
                n_slots,
                tile - group_tile,
                stop - group_tile,
                q_head,
                k_row,
                v_row,
                k_scale_row,
                v_scale_row,
                group_size,
                score_scale,
                softcap,
                HEAD_DIM,
                DIM_BLOCK,
                GROUP_BLOCK,
                BLOCK_N,
                RANGE_BLOCK,
                PACKED,
                SOFTCAP,
            )
            if stop - tile == n_tiles:
                result = value.to(out.dtype.element_ty)
                tl.store(out + head_row * HEAD_DIM + cells, result, mask=stored)
                tl.store(lse + head_row + members, log_mass * LN_2, mask=in_group)
            elif SPLIT:
                part = (2 * program + (tile == group_tile).to(tl.int32)).to(tl.int64) * group_size
                tl.store(part_out + part * HEAD_DIM + cells, value, mask=stored)
                tl.store(part_lse + part + members, log_mass, mask=in_group)
        if SPLIT:
            tile = stop
            group_tile += n_tiles
            group += 1
        else:
            if n_tiles == 0:
                nothing = tl.zeros([GROUP_BLOCK, DIM_BLOCK], out.dtype.element_ty)
                tl.store(out + head_row * HEAD_DIM + cells, nothing, mask=stored)
                minus_inf = tl.full([GROUP_BLOCK], float("-inf"), tl.float32)
                tl.store(lse + head_row + members, minus_inf, mask=in_group)
            tile = end
