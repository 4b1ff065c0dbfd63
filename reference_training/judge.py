"""Dense figures of a trained reference model at all lengths, up to its longest, from its decoder.

Greedy decoding gives an answer right to the last byte exactly if every byte of it is the likeliest
after the bytes before, so one pass over question and answer tells; no cache and no transformers.
`python -m reference_training.judge FOLDER` writes FOLDER/judged.json.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from saap.eval.reference import read_held_out
from saap.eval.reference.sequences import BOS
from saap.eval.tasks import passkey
from saap.eval.tasks.copying import Copying
from saap.eval.tasks.needles import MultiKey, MultiValue
from saap.eval.tasks.tracking import VariableTracking

from .decoder import Decoder, DecoderConfig
from .train import flash_only

LENGTHS = (2048, 8192, 32768, 131072)
N_DISTRACTORS, N_TEXTS = 16, 8
Make = Callable[[bytes, int, np.random.Generator, float], tuple[bytes, bytes]]


def pass_key(text, length, rng, depth):
    prompt = passkey.make_prompt(text, length, rng, n_distractors=N_DISTRACTORS, depth=depth)
    return prompt.text, prompt.answer.encode()


def asked(task) -> Make:
    """A task's prompt and its answers as one list, the form that training shows."""

    def make(text, length, rng, depth):
        (prompt,) = task.make(text, length, rng, depth)
        return prompt.text, ", ".join(prompt.answers[0]).encode()

    return make


TASKS: dict[str, tuple[int, Make]] = {
    "passkey": (100, pass_key),
    "multi-key": (40, asked(MultiKey())),
    "multi-value": (40, asked(MultiValue())),
    "variable-tracking": (40, asked(VariableTracking())),
    "copying": (40, asked(Copying())),
}
"""Prompts a length, and what makes one."""


def load_decoder(folder: Path, device: str) -> Decoder:
    """A trained decoder in float32, from `model.safetensors` and `config.json`."""
    fields = json.loads((folder / "config.json").read_text())
    fields["rope_theta"] = fields["rope_parameters"]["rope_theta"]
    known = DecoderConfig.__dataclass_fields__
    model = Decoder(DecoderConfig(**{k: v for k, v in fields.items() if k in known}))
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.to(device).eval()


class Judge:
    """A decoder with the text that it is judged on."""

    def __init__(self, model: Decoder, text: bytes, device: str, attention: str = "flash"):
        self.model, self.text = model, text
        self.device, self.attention = device, attention

    @torch.no_grad()
    def logits(self, text: bytes) -> tuple[torch.Tensor, torch.Tensor]:
        """What follows each prefix of `text`: logits `[T, vocab]`, and the bytes `[T]`."""
        body = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
        tokens = torch.cat([torch.tensor([BOS]), body]).to(self.device)
        positions = torch.arange(len(text), device=self.device)[None]
        on_gpu = self.device.startswith("cuda")  # flash attention takes 16 bits only
        with (
            flash_only(self.device, self.attention),
            torch.autocast(self.device.split(":")[0], torch.bfloat16, enabled=on_gpu),
        ):
            return self.model(tokens[None, :-1], positions)[0].float(), tokens[1:]

    def is_right(self, prompt: bytes, answer: bytes) -> bool:
        logits, tokens = self.logits(prompt + answer)
        size = len(answer)
        return bool((logits[-size:].argmax(-1) == tokens[-size:]).all())

    def accuracy(self, name: str, length: int, n_prompts: int) -> float:
        """Share of prompts answered without an error, depths spread evenly."""
        rng, make = np.random.default_rng([11, length]), TASKS[name][1]
        right = 0
        for number in range(n_prompts):
            depth = (number + 0.5) / n_prompts * 0.95
            prompt, answer = make(self.text, length - 64, rng, depth)
            right += self.is_right(prompt, answer)
        return right / n_prompts

    def bits_by_eighth(self, length: int) -> list[float]:
        """Bits per byte in each eighth of `length` bytes, over texts spread evenly."""
        total = torch.zeros(8)
        for start in np.linspace(0, len(self.text) - length, N_TEXTS).astype(int):
            logits, tokens = self.logits(self.text[start : start + length])
            losses = torch.nn.functional.cross_entropy(logits, tokens, reduction="none")
            total += torch.stack([part.mean() for part in losses.chunk(8)]).cpu() / np.log(2)
        return [round(float(x), 4) for x in total / N_TEXTS]


def judge(folder: Path, device: str, attention: str = "flash", share: float = 1.0) -> dict:
    """All figures of the model in `folder`; `share` of the prompts, one at least."""
    model = load_decoder(folder, device)
    judged = Judge(model, read_held_out(folder), device, attention)
    found: dict = {"bits_per_byte_by_eighth": {}, "accuracy": {}, "prompts": {}}
    for length in [n for n in LENGTHS if n <= model.config.max_position_embeddings]:
        found["bits_per_byte_by_eighth"][length] = judged.bits_by_eighth(length)
        print(f"{length}: bits {found['bits_per_byte_by_eighth'][length]}", flush=True)
        for name, (most, _) in TASKS.items():
            count = max(1, round(share * most))
            accuracy = judged.accuracy(name, length, count)
            found["prompts"][name] = count
            found["accuracy"].setdefault(name, {})[length] = round(accuracy, 4)
            print(f"{length}: {name} {accuracy:.1%} of {count}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="a run, or the shipped files")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--attention", default="flash")
    parser.add_argument("--share", type=float, default=1.0, help="of the prompts")
    options = parser.parse_args()
    if not (options.folder / "config.json").is_file():
        print(
            f"{options.folder}: must be a folder with config.json; got one without",
            file=sys.stderr,
        )
        sys.exit(2)
    found = judge(options.folder, options.device, options.attention, options.share)
    (options.folder / "judged.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
