"""Device code of the merge, LeanAttention's fix-up (arXiv 2405.10480), as a kernel of its own.

Parts merge in the order of the programs that left them, so that results are the same from run to
run; there is no atomic and no waiting.
"""

import triton
import triton.language as tl

from .triton_schedule import program_of

LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit(do_not_specialize=["n_groups", "group_size", "programs"])
def combine_parts(
    part_out,
    part_lse,
    tile_offsets,
    out,
    lse,
    n_groups,
    group_size,
    programs,
    HEAD_DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    PARTS_BLOCK: tl.constexpr,
):
    """Merges the parts of one query head in the order of the programs; writes empty groups.

    Grid: (n_groups * group_size, cdiv(HEAD_DIM, DIM_BLOCK)).
    """
    head_row = tl.program_id(0)
    group = head_row // group_size
    member = head_row % group_size
    dims = tl.program_id(1) * DIM_BLOCK + tl.arange(0, DIM_BLOCK)
    dim_in_use = dims < HEAD_DIM
    out += head_row.to(tl.int64) * HEAD_DIM
    tiles = tl.load(tile_offsets + n_groups)
    first = tl.load(tile_offsets + group)
    last = tl.load(tile_offsets + group + 1) - 1
    if last < first:
        tl.store(out + dims, tl.zeros([DIM_BLOCK], out.dtype.element_ty), mask=dim_in_use)
        tl.store(lse + head_row, float("-inf"), mask=tl.program_id(1) == 0)
    else:
        first_program = program_of(first, tiles, programs)
        last_program = program_of(last, tiles, programs)
        if first_program != last_program:
            top = float("-inf")
            mass = 0.0
            acc = tl.zeros([DIM_BLOCK], tl.float32)
            for base in range(first_program, last_program + 1, PARTS_BLOCK):
                program = base + tl.arange(0, PARTS_BLOCK)
                exists = program <= last_program
                part = 2 * program + (program == first_program).to(tl.int32)
                part = part.to(tl.int64) * group_size + member
                log_mass = tl.load(part_lse + part, mask=exists, other=float("-inf"))
                values = tl.load(
                    part_out + part[:, None] * HEAD_DIM + dims[None, :],
                    mask=exists[:, None] & dim_in_use[None, :],
                    other=0.0,
                )
                new_top = tl.maximum(top, tl.max(log_mass, 0))
                weights = tl.exp2(log_mass - new_top)
                keep = tl.exp2(top - new_top)
                mass = mass * keep + tl.sum(weights, 0)
                acc = acc * keep + tl.sum(weights[:, None] * values, 0)
                top = new_top
            tl.store(out + dims, (acc / mass).to(out.dtype.element_ty), mask=dim_in_use)
            tl.store(lse + head_row, (top + tl.log2(mass)) * LN_2, mask=tl.program_id(1) == 0)
