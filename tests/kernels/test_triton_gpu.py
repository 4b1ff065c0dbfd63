"""What only a GPU shows: graphs, synchronisation, compiled variants, real sizes, bit equality."""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from .triton_cases import Case, Inputs, attend, backend, check, make_inputs

pytestmark = pytest.mark.gpu

LLAMA = Case(batch=3, q_heads=32, kv_heads=8, rows=20_000, head_dim=128, n_ranges=120)
DENSE = Case("dense", batch=5, q_heads=32, kv_heads=8, rows=20_000, head_dim=128)
BF16 = torch.bfloat16


@pytest.mark.parametrize("options", [{}, {"programs": 7}, {"mode": "group"}], ids=str)
@pytest.mark.parametrize("case", [LLAMA, DENSE], ids=["ranges", "dense"])
def test_real_sizes(case, options):
    inputs = make_inputs(case, BF16)
    check(inputs, case, attend(inputs, case, **options))


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
@pytest.mark.parametrize("storage", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_eight_bit_storage_at_real_sizes(storage, dtype):
    inputs = make_inputs(LLAMA, dtype)
    scale = torch.rand(8, LLAMA.rows, device="cuda") + 0.1
    k, v = ((x * 20).to(storage) for x in (inputs.k, inputs.v))
    eight = Inputs(inputs.q / 20, k, v, inputs.starts, inputs.lengths)
    result = attend(eight, LLAMA, k_scale=scale, v_scale=scale)
    check(eight, LLAMA, result, *(x.float() * scale[:, :, None] for x in (k, v)))


@pytest.mark.parametrize("case", [LLAMA, DENSE], ids=["ranges", "dense"])
def test_a_graph_replays_with_other_lengths_and_ranges(case):
    """Captured once; replays equal eager calls bit for bit."""
    inputs = make_inputs(case, BF16)
    workspace = backend.make_workspace(inputs.q, inputs.k, inputs.starts)
    attend(inputs, case, workspace=workspace)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = attend(inputs, case, workspace=workspace)
    for seed in range(1, 4):
        fresh = make_inputs(case, BF16, seed)
        if seed == 3:
            fresh.lengths[1:] = 0
        for captured, value in zip(vars(inputs).values(), vars(fresh).values(), strict=True):
            captured.copy_(value)
        graph.replay()
        for a, b in zip((out, lse), attend(fresh, case), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("case", [LLAMA, DENSE], ids=["ranges", "dense"])
def test_a_step_neither_synchronises_nor_allocates(case):
    inputs = make_inputs(case, BF16)
    workspace = backend.make_workspace(inputs.q, inputs.k, inputs.starts)
    attend(inputs, case, workspace=workspace)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        attend(inputs, case, workspace=workspace)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


@pytest.mark.parametrize("case", [LLAMA, DENSE], ids=["ranges", "dense"])
def test_runs_are_bit_equal(case):
    inputs = make_inputs(case, BF16)
    first = attend(inputs, case)
    side = torch.cuda.Stream()
    busy = torch.randn(4096, 4096, device="cuda")
    for _ in range(100):
        with torch.cuda.stream(side):
            busy @ busy
        for a, b in zip(first, attend(inputs, case), strict=True):
            assert torch.equal(a, b)


def test_other_shapes_do_not_compile_again():
    """Lengths, ranges, batch, heads and programs are runtime values."""

    def variants() -> list[int]:
        device = torch.cuda.current_device()
        kernels = (backend.pack_ranges, backend.attend_tiles, backend.combine_parts)
        return [len(kernel.device_caches[device][0]) for kernel in kernels]

    def run(batch: int, kv_heads: int, group: int, rows: int, n_ranges: int, programs: int):
        case = Case("ragged", batch, group * kv_heads, kv_heads, rows, 128, n_ranges)
        inputs = make_inputs(case, BF16)
        check(inputs, case, attend(inputs, case, programs=programs))

    run(2, 8, 4, 1000, 50, 100)
    before = variants()
    run(1, 1, 1, 1000, 50, 1)
    run(3, 2, 16, 1777, 33, 64)
    run(16, 16, 3, 512, 16, 528)
    assert variants() == before


def test_two_lists_on_two_streams_with_two_workspaces():
    case = LLAMA
    sets = [make_inputs(case, BF16, seed) for seed in (0, 1)]
    expected = [attend(inputs, case) for inputs in sets]
    spaces = [backend.make_workspace(x.q, x.k, x.starts) for x in sets]
    streams = [torch.cuda.Stream() for _ in sets]
    torch.cuda.synchronize()
    for _ in range(20):
        for inputs, workspace, stream in zip(sets, spaces, streams, strict=True):
            with torch.cuda.stream(stream):
                attend(inputs, case, workspace=workspace)
    torch.cuda.synchronize()
    for workspace, (out, lse) in zip(spaces, expected, strict=True):
        assert torch.equal(workspace.out, out)
        assert torch.equal(workspace.lse, lse)


@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_the_planned_programs_fit_an_sm(head_dim, dtype):
    """What `test_aot.py` shows for its compiler, for the one that runs here."""
    case = Case(head_dim=head_dim)
    inputs = make_inputs(case, dtype)
    workspace = backend.make_workspace(inputs.q, inputs.k, inputs.starts)
    properties = torch.cuda.get_device_properties(inputs.q.device)
    tensors = (*vars(inputs).values(), None, None)
    for launch in backend.launches(*tensors, workspace, sm_scale=0.1, softcap=None):
        compiled = launch.kernel[launch.grid](**launch.arguments, **launch.options)
        assert compiled.n_spills == 0
        if launch.kernel is backend.attend_tiles:
            planned = workspace.plan.blocks.per_sm
            registers = -(-compiled.n_regs // 8) * 8 * 32 * launch.options["num_warps"]
            assert planned * registers <= properties.regs_per_multiprocessor
            shared = compiled.metadata.shared + 1024
            assert planned * shared <= properties.shared_memory_per_multiprocessor
