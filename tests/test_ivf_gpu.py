"""The index on a GPU against the index on the CPU: FAISS's GPU classes, k-means, selection."""

import pytest
import torch

from saap.index import faiss_backend, kmeans
from saap.index.ivf import AsymmetricIVF

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
N_KV, N_HEADS, DIM, NLIST = 2, 8, 64, 32


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def _faiss_gpu():
    if not faiss_backend.has_gpu():
        pytest.skip("this FAISS has no GPU")


def pair(**options):
    centroids = torch.nn.functional.normalize(random(N_KV, NLIST, DIM), dim=-1)
    xb = random(N_KV, 5000, DIM, seed=1)
    indexes = []
    for device in ("cpu", "cuda"):
        index = AsymmetricIVF.from_trained(centroids.to(device), **options)
        index.add(xb.to(device))
        indexes.append(index)
    return indexes


@pytest.mark.parametrize("spill", [False, True])
def test_search_is_that_of_the_cpu(spill):
    on_cpu, on_gpu = pair(spill=spill)
    q = random(9, N_HEADS, DIM, seed=2)
    scores, positions = on_cpu.search(q, 50, 4)
    gpu_scores, gpu_positions = on_gpu.search(q.cuda(), 50, 4)
    assert gpu_scores.is_cuda
    # float32 inner products of 64 terms of size up to about 10, summed in another order.
    assert torch.allclose(gpu_scores.cpu(), scores, atol=1e-4)
    assert (gpu_positions.cpu() == positions).float().mean() >= 0.99  # ties aside


def test_selection_stays_on_the_device():
    on_cpu, on_gpu = pair()
    q = random(9, N_HEADS, DIM, seed=2)
    starts, lengths = on_gpu.select(q.cuda(), nprobe=4)
    assert starts.is_cuda
    own = on_cpu.select(q, nprobe=4)
    assert (lengths.cpu() == own[1]).float().mean() >= 0.99


def test_limits_are_named():
    _, on_gpu = pair()
    with pytest.raises(ValueError, match="k must be at most 2048 for FAISS on a GPU; got 2049"):
        on_gpu.search(random(1, N_HEADS, DIM).cuda(), 2049, 4)


def test_kmeans_fits_as_well_as_on_the_cpu():
    x = random(1, 20_000, DIM, seed=3)
    fits = []
    for points in (x, x.cuda()):
        centroids = kmeans.train_centroids(points, NLIST).cpu()
        fits.append(
            float((torch.nn.functional.normalize(x, dim=-1) @ centroids.mT).amax(-1).mean())
        )
    assert fits[1] >= 0.99 * fits[0]


def test_saved_on_one_device_and_opened_on_the_other(tmp_path):
    _, on_gpu = pair()
    on_gpu.save(tmp_path / "i.safetensors")
    q = random(3, N_HEADS, DIM, seed=2)
    for device in ("cpu", "cuda"):
        opened = AsymmetricIVF.load(tmp_path / "i.safetensors", device=device)
        found = opened.search(q.to(device), 10, 4)[1]
        assert (found.cpu() == on_gpu.search(q.cuda(), 10, 4)[1].cpu()).float().mean() >= 0.99
