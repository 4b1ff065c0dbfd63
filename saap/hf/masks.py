"""What an attention mask says of a forward's tokens, in the forms that models hand on.

Wrappers of models that see images make the masks of their decoder's layers themselves: one for
each kind of layer, of every token and every slot, or none. In some of them the tokens of an image
see later ones of the same image, as in Gemma 3.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from .families import CHUNKED, FULL

ROWS_AT_ONCE = 64
HIDDEN = -1e4
"""A number that is added to a score hides a slot if it is not above this."""


@dataclass(frozen=True)
class Masks:
    """What the mask of one forward says.

    `tokens [B, cached + new]`: slots that hold tokens and no padding; None: all do. `visible`:
    what new tokens see, `[B, new, slots]` bool, the newest slot last, for kinds of layers that are
    asked for anything but what they do without a mask.
    """

    tokens: Tensor | None
    visible: dict[str, Bool[Tensor, "B T N"]]

    def of_kind(self, kind: str, n_queries: int) -> Bool[Tensor, "B n N"] | None:
        """What the last of the new tokens see in layers of this kind; None: as is usual."""
        own = self.visible.get(kind)
        return None if own is None else own[:, -n_queries:]


def masks_of(
    mask, batch: int, slots: int, length: int, windows: dict[str, int] | None = None
) -> Masks:
    """Of a forward of `length` slots behind `slots` others. A mask of two dimensions is given
    back unchecked. `windows`: how many tokens layers see that do not see all, by their kind.

    Raises ValueError for masks in which tokens do not see all before them in layers that see all,
    and for other forms.
    """
    whole = isinstance(mask, Tensor) and mask.ndim == 4
    if whole and windows:
        raise ValueError(
            "attention_mask must be [B, cached + new] where layers have a sliding window, or a "
            f"mask for each kind of layer; got {tuple(mask.shape)} for all of them"
        )
    kinds = mask if isinstance(mask, dict) else {FULL: mask}
    every = {kind: _as_bool(own, batch, length) for kind, own in kinds.items() if _is_whole(own)}
    full = kinds.get(FULL)
    if FULL in every:
        if every[FULL].shape[2] != slots + length:
            raise _wrong(full, length, slots)
        tokens = every[FULL][:, -1]
        _check_sees_before(every[FULL], tokens)
    elif full is None or (isinstance(full, Tensor) and full.ndim == 2):
        tokens = full
    else:
        raise _wrong(full, length, slots)
    places = slots + length
    unusual = {
        kind: own
        for kind, own in every.items()
        if not _is_usual(own, tokens, places, kind, (windows or {}).get(kind))
    }
    return Masks(tokens, unusual)


def _wrong(mask, length: int, slots: int) -> ValueError:
    got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
    return ValueError(
        f"attention_mask must be [B, cached + new] or [B, 1, {length}, {slots + length}]; got "
        f"{got}"
    )


def _is_whole(mask) -> bool:
    return isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[1] == 1


def _as_bool(mask: Tensor, batch: int, length: int) -> Bool[Tensor, "B T N"]:
    """What is visible in a mask that shows or hides, as bool or as floats to add to scores."""
    if mask.shape[0] not in (1, batch) or mask.shape[2] != length:
        raise _wrong(mask, length, mask.shape[3] - length)
    own = mask[:, 0].expand(batch, -1, -1)
    if mask.dtype == torch.bool:
        return own
    shown = own == 0
    if not (mask.is_floating_point() and bool((shown | (own <= HIDDEN)).all())):
        raise ValueError(
            f"a mask of every slot must be bool, or floats of 0 and of at most {HIDDEN:g}; got "
            f"{mask.dtype}" + " of other values" * mask.is_floating_point()
        )
    return shown


def _parts(visible: Bool[Tensor, "B T N"]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Some new tokens at a time, since a whole mask takes much memory already: their slots, which
    of all slots are not later, and what they see."""
    length, n = visible.shape[1:]
    columns = torch.arange(n, device=visible.device)
    for first in range(0, length, ROWS_AT_ONCE):
        rows = columns[n - length + first : n - length + first + ROWS_AT_ONCE]
        yield rows, columns <= rows[:, None], visible[:, first : first + ROWS_AT_ONCE]


def _is_usual(
    visible: Bool[Tensor, "B T N"],
    tokens: Tensor | None,
    slots: int,
    kind: str,
    window: int | None,
) -> bool:
    """Whether tokens see what layers of this kind show them without a mask. Padding may see
    anything. `slots`: those cached, and the new ones."""
    n = visible.shape[2]
    shown = None if tokens is None else tokens.bool()
    padding = None if shown is None else slots - shown.sum(1)[:, None]
    numbers = torch.arange(slots - n, slots, device=visible.device)
    numbers = numbers[None] if padding is None else numbers - padding
    for rows, expected, found in _parts(visible):
        if window is not None and kind == CHUNKED:
            expected = expected & (numbers[:, rows, None] // window == numbers[:, None] // window)
        elif window is not None:
            age = rows[:, None] - torch.arange(n, device=visible.device)
            expected = expected & (age < window)
        other = found != expected
        if shown is not None:
            own = shown[:, -n:]
            other = other & own[:, rows, None] & own[:, None]
        if other.any():
            return False
    return True


def _check_sees_before(visible: Bool[Tensor, "B T N"], tokens: Bool[Tensor, "B N"]) -> None:
    """ValueError where a token does not see all before it: those that come after could not be
    told what is hidden."""
    for rows, before, found in _parts(visible):
        if (before & tokens[:, None] & ~found & tokens[:, rows, None]).any():
            raise ValueError(
                "over a SaapCache every token must see all those before it; got a mask that hides "
                "some"
            )
