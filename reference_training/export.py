"""Write the reference model's folder as Hugging Face libraries expect it."""

import hashlib
import json
import lzma
import shutil
import sys
from pathlib import Path

from saap.eval.reference import FOLDER
from saap.eval.source_text import find_sources, read_sources

from .decoder import DecoderConfig
from .recipe import Recipe, find_recipe

SHIPPED = (
    "model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "recipe.json",
    "held_out.txt.xz", "corpus.json", "judged.json", "plan.json",
)  # fmt: skip
SPECIAL_TOKENS = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}


def byte_alphabet() -> list[str]:
    """The printable stand-in of each byte that byte-level tokenizers use (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(spare)) for b in range(256)]


def write_tokenizer(folder: Path, context: int) -> None:
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
                "model_max_length": context,
                "clean_up_tokenization_spaces": False,
                **SPECIAL_TOKENS,
            },
            indent=1,
        )
    )


def write_config(folder: Path, config: DecoderConfig) -> None:
    (folder / "config.json").write_text(json.dumps(config.to_hf(), indent=1) + "\n")


def held_out_texts(recipe: Recipe) -> list[bytes]:
    """Held-out files in the order of their hash.

    Not those of transformers: its models copy from each other, so a held-out file has near copies
    among those that were trained on.
    """
    sources, _ = find_sources(tuple(n for n in recipe.sources if n != "transformers"))
    texts = [t for s in sources for t in read_sources(s.root, held_out=True, key=s.key)]
    return sorted(texts, key=lambda t: hashlib.sha1(t).hexdigest())


def write_held_out(folder: Path, texts: list[bytes], n_bytes: int, most_a_file: int) -> None:
    """Ship a part of the held-out sources, so that figures are the same on every machine.

    None longer than `most_a_file` bytes (cut at a line).
    """
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


def complete(run: Path, recipe: Recipe) -> None:
    """Put what libraries need to load a finished run's weights beside them, and held-out text."""
    long = recipe.decoder.max_position_embeddings > 8192
    write_config(run, recipe.decoder)
    write_tokenizer(run, recipe.decoder.max_position_embeddings)
    # Long contexts need long files, and texts that do not overlap.
    size = (4_000_000, 300_000) if long else (720_000, 40_000)
    write_held_out(run, held_out_texts(recipe), *size)


def main() -> None:
    """`python -m reference_training.export RUN_FOLDER`: the shipped folder from a run."""
    run = Path(sys.argv[1])
    if not (run / "model.safetensors").is_file():
        print(
            f"{run}: must be the folder of a finished training run; got another", file=sys.stderr
        )
        sys.exit(2)
    if not (run / "config.json").is_file():
        complete(run, find_recipe(sys.argv[2] if len(sys.argv) > 2 else "CPU"))
    FOLDER.mkdir(exist_ok=True)
    for name in SHIPPED:
        if (run / name).is_file():
            shutil.copyfile(run / name, FOLDER / name)
    shutil.copyfile(run / "log.jsonl", FOLDER / "training_log.jsonl")


if __name__ == "__main__":
    main()
