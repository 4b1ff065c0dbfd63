"""Write the reference model's folder as Hugging Face libraries expect it."""

import hashlib
import json
import lzma
import shutil
import sys
from pathlib import Path

from . import FOLDER
from .decoder import DecoderConfig
from .text import read_sources

SPECIAL_TOKENS = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}


def byte_alphabet() -> list[str]:
    """The printable stand-in of each byte that byte-level tokenizers use (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(spare)) for b in range(256)]


def write_tokenizer(folder: Path) -> None:
    """Token id = byte value; `<bos>` = 256 is put first."""
    vocabulary = {symbol: byte for byte, symbol in enumerate(byte_alphabet())}
    specials = {token: 256 + i for i, token in enumerate(SPECIAL_TOKENS.values())}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": number,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for token, number in specials.items()
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": False,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "<bos>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [
                {"SpecialToken": {"id": "<bos>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {"<bos>": {"id": "<bos>", "ids": [256], "tokens": ["<bos>"]}},
        },
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": True,
            "use_regex": True,
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {**vocabulary, **specials},
            "merges": [],
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "model_max_length": 8192,
                "clean_up_tokenization_spaces": False,
                **SPECIAL_TOKENS,
            },
            indent=1,
        )
    )


def write_config(folder: Path, config: DecoderConfig) -> None:
    (folder / "config.json").write_text(json.dumps(config.to_hf(), indent=1) + "\n")


def write_held_out(folder: Path, n_bytes: int = 720_000, most_a_file: int = 40_000) -> None:
    """Ship a part of the held-out sources, so that figures are the same on every machine.

    Files in the order of their hash, none longer than `most_a_file` bytes (cut at a line).
    """
    texts = sorted(read_sources(held_out=True), key=lambda t: hashlib.sha1(t).hexdigest())
    pieces, total = [], 0
    for text in texts:
        piece = text[:most_a_file]
        piece = piece[: piece.rindex(b"\n") + 1] if len(text) > most_a_file else piece
        try:
            piece.decode()
        except UnicodeDecodeError:
            continue
        pieces.append(piece)
        total += len(piece)
        if total >= n_bytes:
            break
    (folder / "held_out.txt.xz").write_bytes(lzma.compress(b"\n".join(pieces), preset=9))


def main() -> None:
    """`python -m saap.eval.reference.export RUN_FOLDER`: the shipped folder from a run."""
    run = Path(sys.argv[1])
    FOLDER.mkdir(exist_ok=True)
    recipe = json.loads((run / "recipe.json").read_text())
    write_config(FOLDER, DecoderConfig(**recipe["decoder"]))
    write_tokenizer(FOLDER)
    write_held_out(FOLDER)
    shutil.copyfile(run / "model.safetensors", FOLDER / "model.safetensors")
    shutil.copyfile(run / "log.jsonl", FOLDER / "training_log.jsonl")
    shutil.copyfile(run / "recipe.json", FOLDER / "recipe.json")


if __name__ == "__main__":
    main()
