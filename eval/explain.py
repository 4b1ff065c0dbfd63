"""Where one prompt's last token looks, and which methods visit it: recall, made visible.

The prompt but its last token is the context; the query of the last token is asked in every layer
and head. Attention is exact, as the model computes it; a method visits what it would visit in
decoding.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saap import hf
from saap.budget import Budget
from saap.kv.ranges import LOCAL

from .tasks.answering import encode
from .tasks.attention import LayerProblem, layout_of
from .variants import Variant

AROUND = 10
"""Tokens on each side of a passage's heaviest one."""


@dataclass(frozen=True)
class Passage:
    """`tokens`: places of its first and after its last token. `mass`: the share of all attention
    of all heads that it has. `found`: of that, what each method visits."""

    tokens: tuple[int, int]
    text: str
    mass: float
    found: dict[str, float]


@dataclass(frozen=True)
class Head:
    """A query head that looks at a passage. `rank`: of the passage's best token among those
    between sinks and window, by this head's own weights, from 1."""

    layer: int
    head: int
    mass: float
    rank: int
    found: dict[str, float]


@dataclass(frozen=True)
class Explanation:
    context: int
    rows: int
    middle_mass: float
    found: dict[str, float]
    passages: list[Passage]
    heads: list[Head]


@torch.no_grad()
def explain(
    model, tokenizer, prompt: str, variants: list[Variant], *, share: float,
    passage: str | None = None, n_passages: int = 6, n_heads: int = 8,
) -> Explanation:  # fmt: skip
    """Explain the prompt's last token at a budget of `share` of the context.

    `passage`: text that occurs in the prompt, whose heads are told; the heaviest passage if None.
    Raises ValueError for a passage that is not between sinks and window.
    """
    tokens = encode(tokenizer, prompt.encode())
    n = len(tokens) - 1
    budget = Budget.for_selectivity(share, n)
    layout = layout_of(budget)
    read = hf.read_context(model, tokens, n_queries=1)
    weights, visited = [], {variant.label: [] for variant in variants}
    numbers, first, stop = [], budget.n_sink, n
    for layer in hf.model_layers(model):
        if not layer.is_full:
            continue
        problem = LayerProblem(read, layer.info, layout)
        first, stop = problem.first, problem.stop
        weights.append(attention_weights(problem))
        numbers.append(layer.info.number)
        for variant in variants:
            visited[variant.label].append(tokens_visited(problem, variant.method, budget))
    all_weights = torch.stack(weights)  # [layers, Hq, N]
    masks = {name: torch.stack(own) for name, own in visited.items()}
    total = all_weights.mean((0, 1))
    if passage is None:
        spans = heaviest(total, first, stop, n_passages)
    else:
        spans = places_of(tokenizer, prompt, passage, first, stop)

    def share_found(where: slice, heads=slice(None), layers=slice(None)) -> dict[str, float]:
        own = all_weights[layers, heads, where]
        mass = float(own.sum())
        return {
            name: float((own * mask[layers, heads, where]).sum()) / max(mass, 1e-30)
            for name, mask in masks.items()
        }

    passages = [
        Passage(
            span,
            tokenizer.decode(tokens[slice(*span)].tolist()),
            float(total[slice(*span)].sum()),
            share_found(slice(*span)),
        )
        for span in spans
    ]
    where = slice(*spans[0])
    of_heads = all_weights[..., where].sum(-1)
    heads = []
    for place in of_heads.flatten().argsort(descending=True)[:n_heads].tolist():
        layer, head = divmod(place, of_heads.shape[1])
        own = all_weights[layer, head]
        rank = 1 + int((own[first:stop] > own[where].max()).sum())
        found = share_found(where, slice(head, head + 1), slice(layer, layer + 1))
        heads.append(Head(numbers[layer], head, float(of_heads[layer, head]), rank, found))
    middle = slice(first, stop)
    return Explanation(
        n,
        budget.max_tokens + n - (stop - first),
        float(total[middle].sum()),
        share_found(middle),
        passages,
        heads,
    )


def attention_weights(problem: LayerProblem) -> Float[Tensor, "Hq N"]:
    """Of the last token, over all tokens."""
    k, q = problem.k_rope[0], problem.q_rope[-1].unflatten(0, (problem.n_kv, -1))
    scores = (q @ k.mT).flatten(0, 1).float() * problem.info.sm_scale
    if problem.info.softcap:
        scores = problem.info.softcap * (scores / problem.info.softcap).tanh()
    return scores.softmax(-1)


def tokens_visited(problem: LayerProblem, method, budget: Budget) -> Bool[Tensor, "Hq N"]:
    """Tokens between sinks and window that a method visits for each query head."""
    store = problem.store_for(method, budget)
    positions = problem.n_context + torch.arange(1, device=problem.k_rope.device)
    starts, lengths = store.select(
        problem.q_rope, problem.q_derope, budget, positions=positions, local_lse=problem.local[1]
    )
    n_heads, n = problem.q_rope.shape[1], problem.k_rope.shape[2]
    mask = torch.zeros(n_heads, n, dtype=torch.bool)
    if starts.shape[-1] < LOCAL:  # nothing was chosen: everything is visited
        mask[:, problem.first : problem.stop] = True
        return mask
    starts, lengths = starts[0, :, LOCAL:].cpu(), lengths[0, :, LOCAL:].cpu()
    of_kv = n_heads // problem.n_kv
    for head in range(n_heads):
        own = head * len(starts) // n_heads
        numbers = store.rows.tokens[0, head // of_kv].cpu().long()
        for start, length in zip(starts[own].tolist(), lengths[own].tolist(), strict=True):
            mask[head, numbers[start : start + length]] = True
    return mask


def heaviest(total: Tensor, first: int, stop: int, count: int) -> list[tuple[int, int]]:
    """Passages around the heaviest tokens of the middle that do not overlap, heaviest first."""
    left = total.clone()
    left[:first] = left[stop:] = 0
    spans = []
    while len(spans) < count and float(left.max()) > 0:
        centre = int(left.argmax())
        span = max(first, centre - AROUND), min(stop, centre + AROUND + 1)
        spans.append(span)
        # Nor may the next one's surroundings reach into this one's.
        left[max(0, centre - 2 * AROUND) : centre + 2 * AROUND + 1] = 0
    if not spans:
        raise ValueError(
            f"the prompt must be longer than sinks and window; got {len(total)} tokens"
        )
    return sorted(spans, key=lambda s: -float(total[slice(*s)].sum()))


def places_of(
    tokenizer, prompt: str, passage: str, first: int, stop: int
) -> list[tuple[int, int]]:
    """Where the passage is between sinks and window, in tokens."""
    spans, at = [], prompt.find(passage)
    while at >= 0:
        begin = len(encode(tokenizer, prompt[:at].encode()))
        end = len(encode(tokenizer, prompt[: at + len(passage)].encode()))
        if first <= begin and end <= stop:
            spans.append((begin, end))
        at = prompt.find(passage, at + 1)
    if not spans:
        raise ValueError(
            "passage must occur in the prompt, between the first tokens and the recent window "
            f"(tokens {first} to {stop}); got {passage!r}"
        )
    return spans
