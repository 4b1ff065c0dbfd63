"""Which token a draft and the exact distribution give, and which logits processors drafts pass."""

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
    """Whether a logits processor may be asked about drafts too: it keeps nothing of a call.

    Of others nobody knows. They are asked about what is emitted alone, so drafts are worse.
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
    """A token of the distribution `exact`, given a `draft` of the distribution `drafted`.

    The draft with the probability `exact / drafted`, at most 1; else a token of what `exact` has
    more than `drafted`, which is never the draft (Leviathan et al., theorem 1).
    """
    if float(torch.rand((), device=exact.device)) * float(drafted[draft]) < float(exact[draft]):
        return draft
    rest = (exact - drafted).clamp(min=0)
    return drawn(rest if float(rest.sum()) > 0 else exact)
