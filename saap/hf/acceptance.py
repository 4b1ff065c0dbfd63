"""The token that follows from a draft and the exact distribution; which processors see drafts."""

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.generation import logits_process as processors_of_transformers

# They keep something from call to call, or call a function of the user's.
WITH_STATE = (
    "UnbatchedClassifierFreeGuidanceLogitsProcessor",
    "SynthIDTextWatermarkLogitsProcessor",
    "PrefixConstrainedLogitsProcessor",
)


def can_guess(processor) -> bool:
    """Whether a logits processor may see drafts, too: it keeps nothing from call to call.

    That is known of transformers' own processors only. Others see emitted tokens alone, so drafts
    are rejected more often.
    """
    own = type(processor)
    return own.__module__ == processors_of_transformers.__name__ and own.__name__ not in WITH_STATE


def likeliest(scores: Float[Tensor, " vocab"]) -> int:
    return int(scores.argmax())


def drawn(shares: Float[Tensor, " vocab"]) -> int:
    return int(torch.multinomial(shares, 1))


def accepted_or_drawn(
    draft: int, exact: Float[Tensor, " vocab"], drafted: Float[Tensor, " vocab"]
) -> int:
    """A token drawn from `exact`, given a `draft` that was drawn from `drafted`.

    Returns the draft with probability `min(1, exact / drafted)`. Otherwise it draws in proportion
    to `max(0, exact - drafted)`, which never gives the draft (Leviathan et al., theorem 1).
    """
    luck = float(torch.rand((), dtype=torch.float32, device=exact.device))
    if luck * float(drafted[draft]) < float(exact[draft]):
        return draft
    rest = (exact - drafted).clamp(min=0)
    return drawn(rest if float(rest.sum()) > 0 else exact)
