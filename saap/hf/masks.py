"""What an attention mask says of a forward's tokens, in the forms that models hand on.

Wrappers of models that see images make the masks of their decoder's layers themselves: one for
each kind of layer, of every token and every slot, or none. In some of them the tokens of an image
see later ones of the same image, as in Gemma 3.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

ROWS_AT_ONCE = 64
FULL = "full_attention"


@dataclass(frozen=True)
class Masks:
    """What the mask of one forward says.

    `tokens [B, cached + new]`: slots that hold tokens and no padding; None: all do. `visible`: for
    each kind of layer what new tokens see, `[B, new, slots]` bool, the newest slot last; empty
    where they see no later tokens than themselves.
    """

    tokens: Tensor | None
    visible: dict[str, Bool[Tensor, "B T N"]]

    def of_kind(self, kind: str, n_queries: int) -> Bool[Tensor, "B n N"] | None:
        """What the last of the new tokens see in layers of this kind; None: as is usual."""
        own = self.visible.get(kind)
        return None if own is None else own[:, -n_queries:]


def masks_of(mask, slots: int, length: int) -> Masks:
    """Of a forward of `length` slots behind `slots` others. A mask of two dimensions is given
    back unchecked.

    Raises ValueError for masks in which tokens do not see all before them, and for other forms.
    """
    kinds = mask if isinstance(mask, dict) else {FULL: mask}
    full = kinds.get(FULL, next(iter(kinds.values()), None))
    if full is None or (isinstance(full, Tensor) and full.ndim == 2):
        return Masks(full, {})
    if not isinstance(full, Tensor) or full.shape[1:] != (1, length, slots + length):
        got = tuple(full.shape) if isinstance(full, Tensor) else type(full).__name__
        raise ValueError(
            f"attention_mask must be [B, cached + new] or [B, 1, {length}, {slots + length}]; got "
            f"{got}"
        )
    visible = _as_bool(full)
    tokens = visible[:, -1]
    if _is_causal(visible, tokens, slots):
        return Masks(tokens, {})
    every = {k: _as_bool(m) for k, m in kinds.items() if isinstance(m, Tensor) and m.ndim == 4}
    return Masks(tokens, every)


def _as_bool(mask: Tensor) -> Bool[Tensor, "B T N"]:
    return mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] >= 0


def _is_causal(visible: Bool[Tensor, "B T N"], tokens: Bool[Tensor, "B N"], slots: int) -> bool:
    """Whether tokens see no later ones. Padding may see anything.

    Raises ValueError where one does not see all tokens up to itself: those that come after could
    not be told what is hidden.
    """
    length, later = visible.shape[1], False
    columns = torch.arange(slots + length, device=visible.device)
    for first in range(0, length, ROWS_AT_ONCE):  # a whole mask takes much memory already
        rows = columns[slots + first : slots + first + ROWS_AT_ONCE]
        before = tokens[:, None] & (columns <= rows[:, None])
        found = visible[:, first : first + ROWS_AT_ONCE] & tokens[:, None]
        real = tokens[:, rows, None]
        if (before & ~found & real).any():
            raise ValueError(
                "over a SaapCache every token must see all those before it; got a mask that hides "
                "some"
            )
        later = later or bool((found & ~before & real).any())
    return not later
