"""Index files: the same index again, opened mapped; what is cut, altered or foreign is refused."""

import json
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from saap.index import ivf_file, tensor_files
from saap.index.ivf import AsymmetricIVF
from saap.index.routers import LinearRouter, MLPRouter

N_KV, N_HEADS, DIM, NLIST = 2, 4, 16, 12


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_router(name):
    if name == "centroid":
        return None
    if name == "linear":
        return LinearRouter(random(N_HEADS, NLIST, DIM), random(N_HEADS, NLIST))
    return MLPRouter(
        random(N_HEADS, DIM), random(N_HEADS, DIM).exp(), random(N_HEADS, 8, DIM, seed=1),
        random(N_HEADS, 8), random(N_HEADS, NLIST + 1, 8), random(N_HEADS, NLIST + 1),
    )  # fmt: skip


def filled(router="mlp", n=300, **options):
    centroids = torch.nn.functional.normalize(random(N_KV, NLIST, DIM, seed=1), dim=-1)
    index = AsymmetricIVF.from_trained(centroids, make_router(router), **options)
    if n:
        xb = random(N_KV, n, DIM, seed=2).to(index.dtype)
        index.add(xb, torch.arange(n).flip(0) + 10, route_by=random(N_KV, n, DIM, seed=3))
    return index


def same(a, b, q):
    for one, other in (
        (a.select(q, nprobe=3), b.select(q, nprobe=3)),
        (a.select(q, max_tokens=50, share="head"), b.select(q, max_tokens=50, share="head")),
        (a.search(q, 7, 3), b.search(q, 7, 3)),
    ):
        for x, y in zip(one, other, strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("spill", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("router", ["mlp", "linear", "centroid"])
def test_reopened_index_selects_and_finds_the_same(tmp_path, router, dtype, spill):
    index = filled(router, dtype=dtype, spill=spill, flush_every=77)
    index.save(tmp_path / "i.safetensors")
    opened = AsymmetricIVF.load(tmp_path / "i.safetensors")
    q = random(3, N_HEADS, DIM, seed=5)
    same(index, opened, q)
    assert (opened.dtype, opened.flush_every, opened.ntotal) == (dtype, 77, 300)
    assert torch.equal(opened.vectors, index.vectors)
    ivf_file.verify(tmp_path / "i.safetensors")


def test_an_opened_index_grows_and_leaves_its_file_alone(tmp_path):
    path = tmp_path / "i.safetensors"
    index = filled()
    index.save(path)
    before = path.read_bytes()
    opened = AsymmetricIVF.load(path)
    for own in (index, opened):
        own.add(random(N_KV, 30, DIM, seed=6))
        own.remove(torch.arange(50, 60))
        own.flush()
    same(index, opened, random(3, N_HEADS, DIM, seed=5))
    mapped = AsymmetricIVF.load(path)
    mapped.truncate(100)  # shrinks in place
    assert path.read_bytes() == before
    opened.save(path)  # over the file it came from
    assert AsymmetricIVF.load(path).ntotal == 320


def test_an_empty_index_is_saved(tmp_path):
    filled(n=0).save(tmp_path / "i.safetensors")
    opened = AsymmetricIVF.load(tmp_path / "i.safetensors")
    assert opened.ntotal == 0
    opened.add(random(N_KV, 5, DIM))
    assert opened.positions[0].tolist() == [0, 1, 2, 3, 4]


def test_opening_reads_no_keys(tmp_path):
    """The resident memory of a fresh process does not grow by the size of the keys."""
    centroids = torch.nn.functional.normalize(random(4, 16, 64), dim=-1)
    index = AsymmetricIVF.from_trained(centroids)
    index.add(random(4, 50_000, 64))
    path = tmp_path / "large.safetensors"
    index.save(path)
    filled().save(tmp_path / "small.safetensors")
    code = (
        "import sys, torch\n"
        "from saap.index.ivf import AsymmetricIVF\n"
        # Once for a small file: what is imported and started on first use is not the subject.
        "AsymmetricIVF.load(sys.argv[2])\n"
        "def resident(): return int(open('/proc/self/statm').read().split()[1]) * 4096\n"
        "before = resident()\n"
        "index = AsymmetricIVF.load(sys.argv[1])\n"
        "print(resident() - before, index.vectors.nbytes)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path), str(tmp_path / "small.safetensors")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    grown, keys = map(int, done.stdout.split())
    assert grown < keys / 5


def refused(path, message):
    with pytest.raises(ValueError, match=message):
        AsymmetricIVF.load(path)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_truncated_files(tmp_path, share):
    path = tmp_path / "i.safetensors"
    filled().save(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    refused(path, "must be a whole safetensors file")


def rewrite_header(path, change, *, sign=False):
    """Apply `change` to the JSON header, and write the file again around it."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    outer = json.loads(data[8 : 8 + length])
    header = json.loads(outer["__metadata__"][ivf_file.FORMAT.kind])
    change(header, outer)
    if sign:
        header["sha256"] = tensor_files.header_digest(header)
    outer["__metadata__"][ivf_file.FORMAT.kind] = json.dumps(header, sort_keys=True)
    inner = json.dumps(outer).encode()
    inner += b" " * (-len(inner) % 8)
    path.write_bytes(struct.pack("<Q", len(inner)) + inner + data[8 + length :])


def change_nlist(header, outer):
    header["nlist"] = 5


def newer_version(header, outer):
    header["format_version"] = 9


def other_shape(header, outer):
    outer["positions"]["shape"] = outer["positions"]["shape"][::-1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_nlist, "its header must fit its checksum"),
        (newer_version, "format version must be 2; got 9: make it again with AsymmetricIVF.save"),
        (other_shape, r"positions must be as its header says, .*\[2, 300\].*got .*\[300, 2\]"),
    ],
)
def test_altered_headers(tmp_path, change, message):
    path = tmp_path / "i.safetensors"
    filled().save(path)
    rewrite_header(path, change)
    refused(path, message)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("ntotal", 299, r"vectors must be float32 \[2, 299, 16\].*got float32 \[2, 300, 16\]"),
        ("nlist", 13, r"offsets must be int32 \[2, 14\], by its header; got int32 \[2, 13\]"),
        ("nlist", 10**6, "nlist as an integer from 1 to 65536; got 1000000"),
        ("nlist", 0, "nlist as an integer from 1 to 65536; got 0"),
        ("n_kv", "two", "n_kv as an integer from 1 to .*; got 'two'"),
        ("d", True, "d as an integer"),
        ("flush_every", [1], r"flush_every as an integer .*; got \[1\]"),
        ("dtype", "int8", "dtype as 'float32' or 'float16' or 'bfloat16'; got 'int8'"),
        ("dtype", ["int8"], "dtype as text"),
        ("dtype", "bfloat16", "vectors must be bfloat16 .*got float32"),
        ("spill", True, r"second must be int32 \[2, 300\], by its header; got none"),
        ("spill", 1, "spill as true or false; got 1"),
        ("router", "linear", "router.weight must be .*; got none"),
        ("router", "tree", "router as 'centroid' or 'linear' or 'mlp'; got 'tree'"),
        ("router", "centroid", r"router.* must not be there, by its header"),
        ("n_heads", 3, "n_heads as a multiple of n_kv=2; got 3"),
        ("n_heads", 2, r"router.mean must be .*\[2, 16\].*got float32 \[4, 16\]"),
        ("tensors", None, "must be as its header says, None"),
        ("tensors", {"vectors": 3}, "vectors must be as its header says, 3"),
    ],
)
def test_a_header_that_contradicts_its_tensors(tmp_path, option, value, message):
    """Its own checksum fits: whoever made it up could compute that, too."""
    path = tmp_path / "i.safetensors"
    filled().save(path)
    rewrite_header(path, lambda header, _: header.update({option: value}), sign=True)
    refused(path, message)


@pytest.mark.parametrize("name", ["n_kv", "dtype", "router", "ntotal", "spill"])
def test_a_header_that_lacks_something(tmp_path, name):
    path = tmp_path / "i.safetensors"
    filled().save(path)
    rewrite_header(path, lambda header, _: header.pop(name), sign=True)
    refused(path, f"{path}: its header must hold {name}; got none")


def test_a_header_that_goes_too_deep(tmp_path):
    path = tmp_path / "i.safetensors"
    deep = "[" * 100_000 + "]" * 100_000
    save_file({"vectors": torch.zeros(2, 3)}, path, metadata={ivf_file.FORMAT.kind: deep})
    refused(path, "must be a whole safetensors file")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("second", lambda t: t.fill_(NLIST), r"second must be within 0\.\.11; got 12\.\.12"),
        ("second", lambda t: t.fill_(-1), "second must be within"),
        ("positions", lambda t: t.sub_(99), "positions must be within"),
        ("centroids", lambda t: t.fill_(torch.nan), "centroids must be finite"),
        ("router.w1", lambda t: t.fill_(torch.inf), "router.w1 must be finite"),
    ],
)
def test_contents_out_of_range(tmp_path, name, change, message):
    """Every checksum fits: these are files that somebody made up."""
    path = tmp_path / "i.safetensors"
    filled(spill=True).save(path)
    header, tensors = ivf_file.open_tensors(path)
    tensors = {n: t.clone() for n, t in tensors.items()}
    change(tensors[name])
    tensor_files.write(path, ivf_file.FORMAT, header, tensors)
    refused(path, message)


def test_positions_that_differ_between_heads_are_found_by_verify(tmp_path):
    path = tmp_path / "i.safetensors"
    filled().save(path)
    header, tensors = ivf_file.open_tensors(path)
    tensors["positions"][1] += 1000
    tensor_files.write(path, ivf_file.FORMAT, header, tensors)
    with pytest.raises(
        ValueError, match="positions must occur once each and be the same in all heads"
    ):
        ivf_file.verify(path)
    opened = AsymmetricIVF.load(path)
    with pytest.raises(ValueError, match="all heads must hold the same positions"):
        opened.truncate(100)


def test_mode_and_link_of_a_file_stay(tmp_path):
    path, link = tmp_path / "i.safetensors", tmp_path / "link"
    before = os.umask(0o027)
    try:
        filled().save(path)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640
    path.chmod(0o604)
    link.symlink_to(path)
    filled(n=20).save(link)
    assert link.is_symlink()
    assert path.stat().st_mode & 0o777 == 0o604
    assert AsymmetricIVF.load(path).ntotal == 20


def test_what_a_killed_process_left_is_removed(tmp_path):
    path = tmp_path / "i.safetensors"
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from saap.index.tensor_files import write_atomically\n"
        "write_atomically(Path(sys.argv[1]), lambda _: os.kill(os.getpid(), signal.SIGKILL))\n"
    )
    subprocess.run([sys.executable, "-c", code, str(path)])
    assert len(os.listdir(tmp_path)) == 1
    (tmp_path / ".i.safetensors.mine").touch()

    def write_another(temporary):  # one that is under way is left alone
        tensor_files.write_atomically(path, b"first")
        assert os.path.exists(temporary)
        Path(temporary).write_text("second")

    tensor_files.write_atomically(path, write_another)
    assert path.read_text() == "second"
    assert sorted(os.listdir(tmp_path)) == [".i.safetensors.mine", "i.safetensors"]


def test_altered_keys_are_found_by_verify_and_altered_offsets_at_once(tmp_path):
    path = tmp_path / "i.safetensors"
    index = filled()
    index.save(path)
    data = bytearray(path.read_bytes())
    place = data.find(index.vectors[1, 5].numpy().tobytes())
    data[place + 3] ^= 0x40
    path.write_bytes(data)
    AsymmetricIVF.load(path)
    with pytest.raises(ValueError, match="vectors must fit its checksum; got another"):
        ivf_file.verify(path)
    index.save(path)
    data = bytearray(path.read_bytes())
    place = data.find(index.offsets.numpy().tobytes())
    data[place + 4 : place + 8] = struct.pack("<i", 10_000)
    path.write_bytes(data)
    refused(path, "bucket offsets must ascend from 0 to 300")


def test_foreign_files(tmp_path):
    path = tmp_path / "x.safetensors"
    refused(path, "must be a file that AsymmetricIVF.save wrote; got no such file")
    path.write_text("not an index")
    refused(path, "must be a whole safetensors file")
    path.write_bytes(pickle.dumps({"vectors": [1]}))
    refused(path, "must be a whole safetensors file")
    save_file({"vectors": torch.zeros(2, 3)}, path)
    refused(path, "must be a file that AsymmetricIVF.save wrote; got another")
    save_file({"vectors": torch.zeros(2, 3)}, path, metadata={ivf_file.FORMAT.kind: "{broken"})
    refused(path, "must be a whole safetensors file")
    ivf_file.to_faiss(filled("centroid"), path, 0)
    refused(path, "must be a whole safetensors file")


def test_a_full_disk_leaves_the_old_file_whole(tmp_path):
    """The write is cut by the system's file-size limit, in a process of its own."""
    path = tmp_path / "i.safetensors"
    filled().save(path)
    before = path.read_bytes()
    code = (
        "import resource, signal, sys, torch\n"
        "from saap.index.ivf import AsymmetricIVF\n"
        "index = AsymmetricIVF.load(sys.argv[1])\n"
        "index.add(torch.randn(2, 4000, 16))\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try:\n"
        "    index.save(sys.argv[1])\n"
        "except ValueError as error:\n"
        "    print(error, '|', index.ntotal)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "cannot be written" in done.stdout
    assert done.stdout.strip().endswith("| 4300")
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["i.safetensors"]


def test_a_folder_or_a_device_is_not_replaced(tmp_path):
    """Renaming a file onto a device would take its place."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (tmp_path, pipe):
        with pytest.raises(
            ValueError, match="must be a file or a new name; got a folder or a device"
        ):
            filled().save(path)
    assert pipe.is_fifo()
    assert os.listdir(tmp_path) == ["pipe"]


def test_unwritable_folder(tmp_path):
    with pytest.raises(ValueError, match="cannot be written"):
        filled().save(tmp_path / "missing" / "i.safetensors")


def test_saving_before_training(tmp_path):
    with pytest.raises(ValueError, match="save must come after training"):
        AsymmetricIVF(DIM, N_KV, NLIST).save(tmp_path / "i.safetensors")


def test_faiss_files_go_out_and_come_back_only_when_trusted(tmp_path):
    index = filled("centroid")
    paths = [tmp_path / f"{head}.faiss" for head in range(N_KV)]
    for head, path in enumerate(paths):
        ivf_file.to_faiss(index, path, head)
    with pytest.raises(ValueError, match="trusted must be True to read FAISS files"):
        ivf_file.from_faiss(paths)
    opened = ivf_file.from_faiss(paths, trusted=True)
    assert torch.equal(opened.offsets, index.offsets)
    for own in (index, opened):
        own.flush()
    q = random(3, N_HEADS, DIM, seed=5)
    for x, y in zip(index.search(q, 7, 3), opened.search(q, 7, 3), strict=True):
        assert torch.equal(x, y)


def test_faiss_files_that_do_not_fit(tmp_path):
    index = filled("centroid")
    a, b = tmp_path / "a.faiss", tmp_path / "b.faiss"
    ivf_file.to_faiss(index, a, 0)
    with pytest.raises(ValueError, match=r"head must be in 0\.\.1; got 2"):
        ivf_file.to_faiss(index, b, 2)
    index.remove(torch.tensor([10]))
    ivf_file.to_faiss(index, b, 1)
    with pytest.raises(
        ValueError, match=r"its nlist, dimension and ids must be those of .*; got others"
    ):
        ivf_file.from_faiss([a, b], trusted=True)
    b.write_bytes(b"no index")
    with pytest.raises(ValueError, match="not a FAISS index file"):
        ivf_file.from_faiss([b], trusted=True)
