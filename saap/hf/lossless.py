"""Lossless decoding: tokens are drafted sparsely and verified by one exact forward.

This is speculative decoding (Leviathan et al., arXiv 2211.17192) in which the model drafts for
itself, as in MagicDec (arXiv 2408.11049). A draft is a step over the rows that a sparse budget
visits; a verification is a forward of several tokens over the same cache, which is exact.
`generate()` prepares everything and calls `decode` in place of its own loop.
"""

import contextlib
import copy
import functools
import inspect
import time

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.generation import (
    GenerateDecoderOnlyOutput,
    GenerationMode,
    LogitsProcessorList,
    StoppingCriteriaList,
    StopStringCriteria,
)

from . import cache_argument
from .acceptance import accepted_or_drawn, can_guess, drawn, likeliest
from .cache import SaapCache
from .few_rows import FewRows, serves
from .pace import Pace


def check_tables(model) -> None:
    """ValueError if RoPE's tables depend on the length: several tokens at once would all see those
    of the last one."""
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    kinds = [p.get("rope_type") for p in (rope, *rope.values()) if isinstance(p, dict)]
    wrong = [kind for kind in kinds if kind in ("dynamic", "longrope")]
    if wrong:
        raise ValueError(
            "verify needs the same RoPE at every length, so rope_type must not be dynamic or "
            f"longrope; got {wrong[0]!r}"
        )


def generate(model, own, *arguments, **keywords):
    """Call the model's `generate()`, `own`; over a `SaapCache` with `decode` as its loop."""
    given = inspect.signature(own).bind(*arguments, **keywords)
    options = {**given.arguments, **given.arguments.get("kwargs", {})}
    options.pop("kwargs", None)
    if not isinstance(cache_argument.given(options), SaapCache):
        return own(*arguments, **keywords)
    for name in ("custom_generate", "assistant_model"):
        if options.get(name) is not None:
            raise ValueError(f"{name} must be None where verify is set; got another loop")
    # transformers keeps neither of these two for a custom loop.
    streamer, tokenizer = options.get("streamer"), options.pop("tokenizer", None)
    config = copy.deepcopy(options.get("generation_config"))
    of_model = getattr(model.generation_config, "stop_strings", None)
    of_config = getattr(config, "stop_strings", None)
    stop = options.pop("stop_strings", None) or of_config or of_model
    if config is not None:
        config.stop_strings = None
        options["generation_config"] = config
    if stop:
        if tokenizer is None:
            raise ValueError(
                "tokenizer must be the model's where stop_strings are given; got none"
            )
        options["stopping_criteria"] = StoppingCriteriaList(
            [*(options.get("stopping_criteria") or ()), StopStringCriteria(tokenizer, stop)]
        )
    loop = functools.partial(decode, streamer=streamer)
    with contextlib.ExitStack() as opened:
        if of_model:  # else it looks for a tokenizer, which it has just dropped
            opened.callback(setattr, model.generation_config, "stop_strings", of_model)
            model.generation_config.stop_strings = None
        return own(**options, custom_generate=loop)


def decode(
    model,
    input_ids,
    logits_processor,
    stopping_criteria,
    generation_config,
    streamer=None,
    synced_gpus=False,
    **model_kwargs,
):
    """The loop that `generate()` calls, with the arguments and result of its own loops."""
    cache = cache_argument.given(model_kwargs)
    mode = generation_config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ValueError(
            "the generation mode must be greedy_search or sample where verify is set; got "
            f"{mode.value}"
        )
    for name in ("output_attentions", "output_hidden_states"):
        if getattr(generation_config, name):
            raise ValueError(f"{name} must be False where verify is set; got True")
    if not generation_config.use_cache:
        raise ValueError("use_cache must be True where verify is set; got False")
    decoding = Decoding(
        model, input_ids, logits_processor, stopping_criteria, generation_config, streamer,
        model_kwargs,
    )  # fmt: skip
    exact, cache.exact = cache.exact, True
    try:
        decoding.run()
    finally:
        cache.exact = exact
    if streamer is not None:
        streamer.end()
    if not generation_config.return_dict_in_generate:
        return decoding.ids
    return GenerateDecoderOnlyOutput(
        sequences=decoding.ids,
        scores=tuple(decoding.scores) if generation_config.output_scores else None,
        logits=tuple(decoding.logits) if generation_config.output_logits else None,
        **cache_argument.over(cache),
    )


class Decoding:
    """One call of `generate()`. Before and after each round the cache holds all of `ids [B, N]`
    but the last of each sequence, which is decoded next.

    The sequences of a batch stay side by side: a verification ends where the first of them needs
    another token than its draft, or is finished. Those that are finished go on with padding, which
    is their draft too, so they hold back none of the others.
    """

    def __init__(self, model, ids, processors, criteria, config, streamer, model_kwargs):
        self.model, self.ids, self.config = model, ids, config
        self.processors, self.criteria, self.streamer = processors, criteria, streamer
        self.kwargs = model_kwargs
        self.cache: SaapCache = cache_argument.given(model_kwargs)
        self.draft_processors = LogitsProcessorList(p for p in processors if can_guess(p))
        eos = getattr(config, "_eos_token_tensor", None)
        self.eos = [] if eos is None else eos.flatten().tolist()
        # As in transformers: without a token that ends a sequence all go on until the last stops.
        self.pads = any(hasattr(own, "eos_token_id") for own in criteria)
        pad = getattr(config, "_pad_token_tensor", None)
        self.pad = 0 if pad is None else int(pad)
        self.finished = [False] * len(ids)
        self.keeps_scores = config.return_dict_in_generate and config.output_scores
        self.keeps_logits = config.return_dict_in_generate and config.output_logits
        self.few_rows = FewRows() if serves(model, ids.device) else contextlib.nullcontext()
        self.scores: list[Tensor] = []
        self.logits: list[Tensor] = []

    @property
    def padded(self) -> list[bool]:
        """For each sequence whether it goes on with padding."""
        return [self.pads and finished for finished in self.finished]

    def run(self) -> None:
        outputs = self.model._prefill(self.ids, self.config, self.kwargs)
        for name in ("position_ids", *cache_argument.NAMES):
            self.kwargs.pop(name, None)
        if self.cache.pace is None:
            self.cache.pace = Pace(self.cache.owner.verify)
        self.pace = self.cache.pace
        self.accept(outputs.logits[:, -1:], [], [])
        del outputs
        while not all(self.finished):
            most = self.config.max_length - self.ids.shape[1] - 1
            self.round(self.pace.choose(most) if self.can_draft() else 0)

    def can_draft(self) -> bool:
        """Whether a sparse step leaves out anything; fixed numbers of drafts do not ask."""
        if not self.pace.verify.adapt:
            return True
        return any([layer.store.chooses() for layer in self.cache.saap_layers])

    def round(self, n: int) -> None:
        """Draft `n` tokens of each sequence and verify them."""
        drafts, shares, seconds = self.draft(n) if n else ([], [], [])
        ids = self.followed_by(*drafts)
        with self.cache.on_trial() as trial:
            begin = time.perf_counter()
            logits = self.forward(ids, len(drafts) + 1)
            # Not before the first result is read has a GPU done its work.
            emitted = self.accept(logits, drafts, shares, trial)
            took = time.perf_counter() - begin
        tested = min(emitted, len(drafts))
        same = sum(self.ids[:, i - emitted].tolist() == drafts[i] for i in range(tested))
        self.pace.took(seconds, took, tested, same)

    def draft(self, n: int) -> tuple[list[list[int]], list[Tensor | None], list[float]]:
        """Up to `n` tokens of sparse steps for each sequence, the distributions `[B, vocab]` that
        they were drawn from (None: the likeliest were taken), and the seconds of each step."""
        drafts: list[list[int]] = []
        shares: list[Tensor | None] = []
        seconds: list[float] = []
        ids, padded = self.ids, self.padded
        with self.cache.drafting():
            while len(drafts) < n:
                begin = time.perf_counter()
                scores = self.draft_processors(ids, self.forward(ids, 1)[:, 0])
                share = scores.softmax(-1) if self.config.do_sample else None
                drafts.append([
                    self.pad if padded[b]
                    else likeliest(scores[b]) if share is None
                    else drawn(share[b])
                    for b in range(len(ids))
                ])  # fmt: skip
                shares.append(share)
                seconds.append(time.perf_counter() - begin)
                ids = self.followed_by(*drafts)
                ends = [
                    t in self.eos for t, out in zip(drafts[-1], padded, strict=True) if not out
                ]
                if any(ends):  # a verification would go no further
                    break
        return drafts, shares, seconds

    def followed_by(self, *tokens: list[int]) -> Tensor:
        """`ids`, then for each sequence its own of each list."""
        if not tokens:
            return self.ids
        return torch.cat([self.ids, self.ids.new_tensor(tokens).T], 1)

    def accept(self, logits, drafts, shares, trial=None) -> int:
        """Emit tokens by exact `logits [B, n + 1, vocab]` of the last token and n drafts.

        A token follows the exact distribution after those before it, whatever is drafted and
        whatever other sequences need: no place is looked at before all are through with the one
        before. Processors and stopping criteria are called for one place after the other, those
        that are emitted and no others, so they may keep state. Returns how many were emitted.
        """
        for place in range(logits.shape[1]):
            own = logits[:, place].to(torch.float32, copy=True)
            scores = self.processors(self.ids, own.clone() if self.keeps_logits else own)
            draft = drafts[place] if place < len(drafts) else None
            tokens = self.tokens(scores, draft, shares[place] if draft else None)
            if self.keeps_scores:
                self.scores.append(scores)
            if self.keeps_logits:
                self.logits.append(own)
            self.ids = self.followed_by(tokens)
            if trial is not None:
                trial.keep = place + 1
            if self.streamer is not None:
                self.streamer.put(self.ids[:, -1].cpu())
            given = tuple(self.scores) if self.keeps_scores else None
            before, stopped = self.padded, self.criteria(self.ids, given).tolist()
            self.finished = [a or b for a, b in zip(self.finished, stopped, strict=True)]
            if all(self.finished) or tokens != draft or self.padded != before:
                break
        return place + 1

    def tokens(
        self, scores: Float[Tensor, "B vocab"], drafts: list[int] | None, shares: Tensor | None
    ) -> list[int]:
        """The next token of each sequence, by exact scores and what was drafted for the place."""
        found = []
        for b, padded in enumerate(self.padded):
            if padded:
                found.append(self.pad)
            elif not self.config.do_sample:
                found.append(likeliest(scores[b]))
            elif drafts is None:
                found.append(drawn(scores[b].softmax(-1)))
            else:
                found.append(accepted_or_drawn(drafts[b], scores[b].softmax(-1), shares[b]))
        return found

    def forward(self, ids: Tensor, n: int) -> Float[Tensor, "B n vocab"]:
        """Logits of the last `n` of `ids [B, N]`, over the cache of those before."""
        slots = self.cache.get_seq_length()
        own = dict(self.kwargs, **cache_argument.over(self.cache))
        last = torch.tensor(self.cache.last_positions, device=ids.device)
        own["position_ids"] = last[:, None] + torch.arange(1, n + 1, device=ids.device)
        mask = own.pop("attention_mask", None)
        if mask is not None:
            new = mask.new_ones(len(ids), max(0, slots + n - mask.shape[1]))
            own["attention_mask"] = torch.cat([mask, new], 1)
        inputs = self.model.prepare_inputs_for_generation(
            ids[:, -n:], next_sequence_length=n, **own
        )
        if "logits_to_keep" in inputs:
            inputs["logits_to_keep"] = n
        with self.few_rows if n > 1 else contextlib.nullcontext():
            return self.model(**inputs, return_dict=True).logits[:, -n:].float()
