"""Lossless decoding: tokens are drafted sparsely and verified by one exact forward.

Speculative decoding (Leviathan et al., arXiv 2211.17192) in which the model drafts for itself, as
in MagicDec (arXiv 2408.11049): a draft is a step over the rows that a sparse budget visits, a
verification a forward of several tokens over the same cache, which is exact. `generate()` prepares
everything and calls `decode` where it would have called its own loop.
"""

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
from transformers.generation import logits_process as processors_of_transformers

from .cache import SaapCache
from .pace import Pace

# They keep something from call to call, or call a function of the user's.
WITH_STATE = (
    "UnbatchedClassifierFreeGuidanceLogitsProcessor",
    "SynthIDTextWatermarkLogitsProcessor",
    "PrefixConstrainedLogitsProcessor",
)


def check_tables(model) -> None:
    """ValueError where RoPE's tables depend on the length: several tokens at once would see those
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
    """`own` is the model's `generate()`; over a `SaapCache` it decodes by `decode`."""
    given = inspect.signature(own).bind(*arguments, **keywords)
    options = {**given.arguments, **given.arguments.get("kwargs", {})}
    options.pop("kwargs", None)
    if not isinstance(options.get("past_key_values"), SaapCache):
        return own(*arguments, **keywords)
    for name in ("custom_generate", "assistant_model"):
        if options.get(name) is not None:
            raise ValueError(f"{name} must be None where verify is set; got another loop")
    # transformers keeps neither of these two for a custom loop.
    streamer, tokenizer = options.get("streamer"), options.pop("tokenizer", None)
    config = copy.deepcopy(options.get("generation_config"))
    stop = options.pop("stop_strings", None) or getattr(config, "stop_strings", None)
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
    return own(**options, custom_generate=functools.partial(decode, streamer=streamer))


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
    """The loop that `generate()` calls: arguments and result as those of its own."""
    cache = model_kwargs["past_key_values"]
    mode = generation_config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ValueError(
            "the generation mode must be greedy_search or sample where verify is set; got "
            f"{mode.value}"
        )
    if len(input_ids) != 1:
        raise ValueError(f"the batch must be 1 where verify is set; got {len(input_ids)}")
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
        past_key_values=cache,
    )


class Decoding:
    """One call of `generate()`. Before and after each round the cache holds all of `ids [1, N]`
    but the last, which is decoded next."""

    def __init__(self, model, ids, processors, criteria, config, streamer, model_kwargs):
        self.model, self.ids, self.config = model, ids, config
        self.processors, self.criteria, self.streamer = processors, criteria, streamer
        self.kwargs = model_kwargs
        self.cache: SaapCache = model_kwargs["past_key_values"]
        self.draft_processors = LogitsProcessorList(p for p in processors if can_guess(p))
        eos = getattr(config, "_eos_token_tensor", None)
        self.eos = [] if eos is None else eos.flatten().tolist()
        self.keeps_scores = config.return_dict_in_generate and config.output_scores
        self.keeps_logits = config.return_dict_in_generate and config.output_logits
        self.scores: list[Tensor] = []
        self.logits: list[Tensor] = []

    def run(self) -> None:
        outputs = self.model._prefill(self.ids, self.config, self.kwargs)
        for name in ("position_ids", "past_key_values"):
            self.kwargs.pop(name, None)
        if self.cache.pace is None:
            self.cache.pace = Pace(self.cache.owner.verify)
        self.pace = self.cache.pace
        _, done = self.accept(outputs.logits[0, -1:], [], [])
        del outputs
        while not done:
            most = self.config.max_length - self.ids.shape[1] - 1
            done = self.round(self.pace.choose(most) if self.can_draft() else 0)

    def can_draft(self) -> bool:
        """Whether a sparse step leaves out anything; fixed numbers of drafts do not ask."""
        if not self.pace.verify.adapt:
            return True
        return any([layer.store.chooses() for layer in self.cache.saap_layers])

    def round(self, n: int) -> bool:
        """Draft `n` tokens and verify them; whether that was the last round."""
        drafts, shares, seconds = self.draft(n) if n else ([], [], [])
        ids = torch.cat([self.ids, self.ids.new_tensor([drafts])], 1) if drafts else self.ids
        with self.cache.on_trial() as trial:
            begin = time.perf_counter()
            logits = self.forward(ids, len(drafts) + 1)
            # Not before the first result is read has a GPU done its work.
            emitted, done = self.accept(logits, drafts, shares, trial)
            took = time.perf_counter() - begin
        tested = min(emitted, len(drafts))
        same = sum(int(self.ids[0, i - emitted]) == drafts[i] for i in range(tested))
        self.pace.took(seconds, took, tested, same)
        return done

    def draft(self, n: int) -> tuple[list[int], list[Tensor | None], list[float]]:
        """Up to `n` tokens of sparse steps, the distribution `[vocab]` that each was drawn from
        (None: the likeliest was taken), and the seconds of each step."""
        drafts: list[int] = []
        shares: list[Tensor | None] = []
        seconds: list[float] = []
        ids = self.ids
        with self.cache.drafting():
            while len(drafts) < n and not (drafts and drafts[-1] in self.eos):
                begin = time.perf_counter()
                scores = self.draft_processors(ids, self.forward(ids, 1))[0]
                share = scores.softmax(-1) if self.config.do_sample else None
                drafts.append(likeliest(scores) if share is None else drawn(share))
                shares.append(share)
                seconds.append(time.perf_counter() - begin)
                ids = torch.cat([ids, ids.new_tensor([drafts[-1:]])], 1)
        return drafts, shares, seconds

    def accept(self, logits, drafts, shares, trial=None) -> tuple[int, bool]:
        """Emit tokens by exact `logits [n + 1, vocab]` of the last token and n drafts.

        Processors and stopping criteria are called for one token after the other, those that are
        emitted and no others, so they may keep state. Returns how many were emitted, and whether
        one of them was the last.
        """
        for place in range(len(logits)):
            own = logits[place : place + 1].to(torch.float32, copy=True)
            scores = self.processors(self.ids, own.clone() if self.keeps_logits else own)
            draft = drafts[place] if place < len(drafts) else None
            if not self.config.do_sample:
                token = likeliest(scores[0])
            elif draft is None:
                token = drawn(scores[0].softmax(-1))
            else:
                token = accepted_or_drawn(draft, scores[0].softmax(-1), shares[place])
            if self.keeps_scores:
                self.scores.append(scores)
            if self.keeps_logits:
                self.logits.append(own)
            self.ids = torch.cat([self.ids, self.ids.new_tensor([[token]])], 1)
            if trial is not None:
                trial.keep = place + 1
            if self.streamer is not None:
                self.streamer.put(self.ids[:, -1].cpu())
            given = tuple(self.scores) if self.keeps_scores else None
            if bool(self.criteria(self.ids, given).all()):
                return place + 1, True
            if token != draft:
                break
        return place + 1, False

    def forward(self, ids: Tensor, n: int) -> Float[Tensor, "n vocab"]:
        """Logits of the last `n` of `ids [1, N]`, over the cache of those before."""
        slots, first = self.cache.get_seq_length(), self.cache.last_positions[0] + 1
        own = dict(self.kwargs, past_key_values=self.cache)
        own["position_ids"] = torch.arange(first, first + n, device=ids.device)[None]
        mask = own.pop("attention_mask", None)
        if mask is not None:
            new = mask.new_ones(1, max(0, slots + n - mask.shape[1]))
            own["attention_mask"] = torch.cat([mask, new], 1)
        inputs = self.model.prepare_inputs_for_generation(
            ids[:, -n:], next_sequence_length=n, **own
        )
        if "logits_to_keep" in inputs:
            inputs["logits_to_keep"] = n
        return self.model(**inputs, return_dict=True).logits[0, -n:].float()


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
