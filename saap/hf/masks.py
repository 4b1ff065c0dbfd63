"""What an attention mask says of a forward's tokens, in the forms that models hand on.

Wrappers of models that see images make the masks of their decoder's layers themselves: one for
each kind of layer, of every token and every slot, or none.
"""

import torch
from jaxtyping import Bool
from torch import Tensor

ROWS_AT_ONCE = 64


def tokens_of(mask, slots: int, length: int) -> Tensor | None:
    """Which slots hold tokens and no padding, `[B, slots + length]`, for a forward of `length`
    slots behind `slots` others; None: all do. A mask of two dimensions is given back unchecked.

    Raises ValueError for masks in which tokens see later ones, and for any other form.
    """
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if mask is None or (isinstance(mask, Tensor) and mask.ndim == 2):
        return mask
    if not isinstance(mask, Tensor) or mask.shape[1:] != (1, length, slots + length):
        got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"attention_mask must be [B, cached + new] or [B, 1, {length}, {slots + length}]; got "
            f"{got}"
        )
    visible = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] >= 0
    tokens = visible[:, -1]
    if not _is_causal(visible, tokens, slots):
        raise ValueError(
            "attention must be causal over a SaapCache; got a mask in which tokens see later "
            "ones, as those of an image do in this model, or do not see earlier ones"
        )
    return tokens


def _is_causal(visible: Bool[Tensor, "B T N"], tokens: Bool[Tensor, "B N"], slots: int) -> bool:
    """Whether each token sees all tokens up to itself, and no other. Padding may see anything."""
    length = visible.shape[1]
    columns = torch.arange(slots + length, device=visible.device)
    for first in range(0, length, ROWS_AT_ONCE):  # a whole mask takes much memory already
        rows = columns[slots + first : slots + first + ROWS_AT_ONCE]
        seen = tokens[:, None] & (columns <= rows[:, None])
        found = visible[:, first : first + ROWS_AT_ONCE]
        if ((found != seen) & tokens[:, rows, None]).any():
            return False
    return True
