"""What a model on another device is asked, to be held against the same on the CPU."""

from collections.abc import Callable

import torch
import transformers

import saap
from saap.budget import Budget
from saap.hf import over
from saap.methods import METHODS

METHODS_WITHOUT_INDEX = [name for name, own in METHODS.items() if not own.needs_index]
BOUND = {"max_tokens": 64, "n_sink": 4, "window": 32, "flush_every": 8}

VARIANTS: dict[str, tuple[dict, dict, dict]] = {
    "padded batch": ({}, {}, {}),
    "beams": ({}, {}, {"num_beams": 2}),
    "by weight": ({"min_weight": 1e-3}, {}, {}),
    "a selection for each query head": ({"share": "head"}, {}, {}),
    "verified": ({}, {"verify": 4}, {}),
    "prompt lookup": ({}, {}, {"prompt_lookup_num_tokens": 4}),
    "int8 rows": ({}, {"kv_dtype": torch.int8}, {}),
}
"""Name → fields of the budget, options of `attached`, options of `generate`."""


def tiny_model(peaked: float = 1.0) -> torch.nn.Module:
    """`peaked`: how many times larger queries and keys are than they begin as."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=8192,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data *= peaked
        layer.self_attn.k_proj.weight.data *= peaked
    return model


def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    """`tokens, mask [2, 700]`, the second prompt padded on the left."""
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, 256, (2, 700), generator=draw)
    mask = torch.ones_like(tokens)
    mask[1, :100] = 0
    return tokens, mask


@torch.no_grad()
def logits_of_steps(
    model, method: str, device, steps: int = 20, after: Callable = bool
) -> torch.Tensor:
    """Of given tokens after a prompt `[steps + 1, 1, vocabulary]`, on the CPU: some flushes.

    `after` is called after each step.
    """
    tokens, _ = prompts()
    with saap.attached(model, None, Budget(**BOUND), method=method) as saap_model:
        cache = saap_model.cache()
        found = [model(tokens[:1].to(device), **over(cache)).logits[:, -1]]
        for i in range(steps):
            token = torch.tensor([[i]], device=device)
            found.append(model(token, **over(cache)).logits[:, -1])
            after()
    return torch.stack([logits.cpu() for logits in found])


@torch.no_grad()
def generated(model, variant: str, device) -> torch.Tensor:
    budget, attaching, generating = VARIANTS[variant]
    tokens, mask = (t.to(device) for t in prompts())
    if variant in ("verified", "prompt lookup"):
        tokens, mask = tokens[:1], mask[:1]
    with saap.attached(model, None, Budget(**BOUND, **budget), **attaching) as saap_model:
        return model.generate(
            tokens, attention_mask=mask, **over(saap_model.cache()), max_new_tokens=20,
            do_sample=False, **generating,
        ).cpu()  # fmt: skip


@torch.no_grad()
def generated_after_saving(model, device, path) -> torch.Tensor:
    tokens = prompts()[0][:1].to(device)
    with saap.attached(model, None, Budget(**BOUND)) as saap_model:
        cache = saap_model.cache()
        model(tokens, **over(cache))
        saap_model.save_context(cache, tokens[0].cpu(), path)
        cache, _ = saap_model.open_context(path)
        more = torch.cat([tokens, tokens[:, :3]], 1)
        return model.generate(
            more, **over(cache), max_new_tokens=12, do_sample=False
        ).cpu()  # fmt: skip


def on_each(model: torch.nn.Module, ask: Callable, device) -> tuple:
    """What `ask(device)` gives with the model on the CPU, and on `device`."""
    expected = ask(torch.device("cpu"))
    model.to(device)
    return expected, ask(device)
