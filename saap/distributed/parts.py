"""Which rank holds which tokens of a context."""

from collections.abc import Sequence

from .group import Group


def check_parts(parts: Sequence[int] | None, group: Group) -> None:
    """ValueError unless `parts` says how many tokens each rank but the last one holds."""
    if parts is None:
        return
    whole = all(isinstance(n, int) and n > 0 for n in parts)
    if len(parts) != group.size - 1 or not whole:
        raise ValueError(
            f"parts must be {group.size - 1} numbers of tokens above 0, for all of {group.size} "
            f"ranks but the last, which holds what follows; got {list(parts)}"
        )


def even_parts(n_tokens: int, group: Group) -> list[int]:
    """Parts of the ranks but the last, as equal as may be. ValueError for fewer tokens."""
    if n_tokens < group.size:
        raise ValueError(
            f"a context must have a token for each of {group.size} ranks; got {n_tokens} tokens"
        )
    share, more = divmod(n_tokens, group.size)
    return [share + (rank < more) for rank in range(group.size - 1)]


def begins_of(parts: Sequence[int]) -> list[int]:
    """The first token of each rank."""
    begins = [0]
    for n in parts:
        begins.append(begins[-1] + n)
    return begins
