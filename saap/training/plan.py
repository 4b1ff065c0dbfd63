"""Which tokens of a corpus are used for what, and the memory that this takes.

Everything here depends on the corpus, the options and the seed alone: the same in every process
and after every interruption.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .options import TrainingOptions

KEY_SAMPLE = 65536  # keys a head for k-means ...
KEY_SEQUENCES = 12  # ... from at most this many sequences
QUERY_STRIDE = 8  # every so many queries are targets, but ...
MAX_QUERIES = 32768  # ... no more than these: each is met 6 times in 400 steps of 512
PIECE = 16  # tokens of the pieces by which a repetitive corpus is told
MIN_DISTINCT_SHARE = 0.02


@dataclass(frozen=True)
class Plan:
    """`sequences` of 1-D int64 tokens, the first `n_held` for the recorded recall alone.

    `key_picks[i]`: positions whose keys are clustered, for some of the sequences. A query is used
    at every `query_stride`-th position from `first_query` on.
    """

    sequences: list[Tensor]
    n_held: int
    key_picks: dict[int, Tensor]
    query_stride: int
    first_query: int

    @property
    def context(self) -> int:
        return max(len(t) for t in self.sequences)

    @property
    def n_tokens(self) -> int:
        return sum(len(t) for t in self.sequences)

    def chosen(self, start: int, stop: int) -> Tensor:
        """Positions of the queries that are targets, of those from `start` to `stop`."""
        places = torch.arange(start, stop)
        return places[(places % self.query_stride == 0) & (places >= self.first_query)]

    def n_queries(self, numbers: Sequence[int]) -> int:
        """Targets in the sequences of these numbers."""
        return sum(len(self.chosen(0, len(self.sequences[i]))) for i in numbers)

    @property
    def held(self) -> range:
        return range(self.n_held)

    @property
    def fitted(self) -> range:
        return range(self.n_held, len(self.sequences))


def as_sequences(token_ids: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """Return 1-D sequences of int64; raise ValueError for other input and an empty corpus."""
    sequences = list(token_ids)
    if not all(isinstance(t, Tensor) for t in sequences):
        kinds = ", ".join(sorted({type(t).__name__ for t in sequences}))
        raise ValueError(f"token_ids must be tensors; got {kinds}")
    if not sequences or any(t.ndim != 1 or t.numel() == 0 for t in sequences):
        shapes = [tuple(t.shape) for t in sequences[:3]]
        raise ValueError(
            f"token_ids must be [n, T] or 1-D sequences, none empty; got shapes {shapes}"
        )
    return [t.long().cpu() for t in sequences]


def make_plan(sequences: list[Tensor], options: TrainingOptions) -> Plan:
    """Plan a training, with one in eight sequences held back.

    Raises ValueError for text that is too short or repetitive.
    """
    shortest = options.n_sink + options.window + options.nlist
    long_enough = [t for t in sequences if len(t) > shortest]
    if len(long_enough) < 2:
        raise ValueError(
            "at least 2 sequences must be longer than n_sink + window + nlist = "
            f"{shortest} tokens; got {len(long_enough)}: lower nlist or bring more text"
        )
    check_variety(long_enough, options.nlist)
    n_held = max(1, len(long_enough) // 8)
    fitted = range(n_held, len(long_enough))
    clustered = fitted[:: -(-len(fitted) // KEY_SEQUENCES)]
    each = max(1, KEY_SAMPLE // len(clustered))
    generator = torch.Generator().manual_seed(options.seed)
    picks = {}
    for number in clustered:
        middle = torch.arange(options.n_sink, len(long_enough[number]))
        order = torch.randperm(len(middle), generator=generator)
        picks[number] = middle[order[:each]].sort().values
    stride = max(QUERY_STRIDE, -(-sum(len(t) - shortest for t in long_enough) // MAX_QUERIES))
    plan = Plan(long_enough, n_held, picks, stride, shortest)
    if not (plan.n_queries(plan.held) and plan.n_queries(plan.fitted)):
        raise ValueError(
            f"sequences must be longer than n_sink + window + nlist = {shortest} tokens by at "
            f"least {stride}; got {max(map(len, long_enough))} tokens: lower nlist or bring "
            "more text"
        )
    return plan


def check_variety(sequences: list[Tensor], nlist: int) -> None:
    """Raise ValueError for a corpus that repeats the same text.

    k-means would find duplicates, and a router trained on one line works for that line only.
    """
    codes = torch.cat([_piece_codes(t) for t in sequences])
    distinct = len(torch.unique(codes))
    needed = max(nlist, int(MIN_DISTINCT_SHARE * len(codes)))
    if distinct < needed:
        raise ValueError(
            f"the corpus must have at least {needed:,} distinct pieces of {PIECE} tokens "
            f"(nlist={nlist} buckets need as many different keys, and {MIN_DISTINCT_SHARE:.0%} of "
            f"the pieces have to be different); got {distinct:,} distinct pieces of {PIECE} "
            "tokens "
            f"among {len(codes):,}: it repeats itself, bring other text"
        )


def _piece_codes(tokens: Tensor) -> Tensor:
    """A 64-bit code for each run of `PIECE` tokens; products wrap around."""
    pieces = tokens.unfold(0, min(PIECE, len(tokens)), 1)
    multipliers = [1]
    for _ in range(pieces.shape[1] - 1):
        wrapped = multipliers[-1] * 6364136223846793005 % 2**64
        multipliers.append(wrapped - 2**64 if wrapped >= 2**63 else wrapped)
    return ((pieces + 1) * torch.tensor(multipliers)).sum(-1)


@dataclass(frozen=True)
class MemoryNeeded:
    """Bytes that a training takes beside the model, estimated from shapes.

    `layer`: at the worst moment of any layer. `hidden`: hidden states of all sequences, between
    two layers; on disk both layers' at once, in memory one and a sequence.
    """

    layer: int
    hidden: int


def memory_needed(
    plan: Plan, options: TrainingOptions, model: dict, hidden_size: int, itemsize: int
) -> MemoryNeeded:
    """For a model with `saap.hf.describe`'s shapes, whose activations have `itemsize` bytes."""
    heads, kv_heads, dim = (model[k] for k in ("num_heads", "num_kv_heads", "head_dim"))
    keys = sum(len(p) for p in plan.key_picks.values()) * kv_heads * dim
    clustering = keys * (itemsize * (3 if options.baselines else 2) + 4)
    cache = 3 * kv_heads * plan.context * dim * itemsize
    classes = options.nlist + 1
    queries = plan.n_queries(range(len(plan.sequences)))
    targets = queries * heads * (4 * dim + 2 * classes)
    scores = 64 * (heads // kv_heads) * plan.context * 4 * 4
    new_tokens = min(plan.context, 8192)
    assigning = kv_heads * new_tokens * options.nlist * 4
    fitting = 512 * heads * classes * 4 * 8
    layer = max(clustering, targets + cache + max(scores, assigning), targets + fitting)
    hidden = plan.n_tokens * hidden_size * itemsize
    return MemoryNeeded(layer, hidden)
