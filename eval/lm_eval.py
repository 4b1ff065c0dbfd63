"""Tasks of lm-evaluation-harness through its Python API, read with a method of this library.

    import lm_eval
    from saap.eval.lm_eval import SaapLM

    lm = SaapLM("path/to/model", "saap", saap.Budget(max_tokens=2048), index="index.safetensors")
    lm_eval.simple_evaluate(model=lm, tasks=["longbench_2wikimqa"])

The beginning of each prompt is read densely; its last `question_tokens` tokens and the answer go
through the method. Greedy answers and log-likelihoods of answers; one prompt at a time.
"""

from pathlib import Path

from saap import hf
from saap.budget import Budget
from saap.methods import find_method
from saap.trained_index import TrainedIndex

from .reader import SparseReader, shortened

try:
    from lm_eval.api.model import TemplateLM
except ImportError as error:
    raise ImportError(
        f"tasks of lm-eval need it installed ({error}): pip install 'lm-eval>=0.4.13'"
    ) from error

DEFAULT_ANSWER = 256


class SaapLM(TemplateLM):
    """A `lm_eval` model. `model`: a folder, a hub name, or a loaded model with its `tokenizer`."""

    backend = "causal"

    def __init__(
        self,
        model,
        method: str = "saap",
        budget: Budget | None = None,
        *,
        index: str | Path | TrainedIndex | None = None,
        tokenizer=None,
        question_tokens: int = 64,
        seed: int = 0,
    ):
        super().__init__()
        if isinstance(model, str | Path):
            model, tokenizer = hf.load_model(model), hf.load_tokenizer(model)
        if tokenizer is None:
            raise ValueError("tokenizer must be that of the loaded model; got None")
        if isinstance(index, str | Path):
            index = TrainedIndex.load(index)
        if index is not None:
            index.check_model(hf.describe(model))
        self.model, self.tokenizer = model, tokenizer
        self.max_length = hf.max_context(model)
        chosen = find_method(method)(index, seed=seed)
        budget = budget or Budget.default()
        self.reader = SparseReader(model, chosen, budget, question_tokens=question_tokens)

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id or 0

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string, add_special_tokens=None, **options) -> list[int]:
        special = True if add_special_tokens is None else add_special_tokens
        return self.tokenizer(string, add_special_tokens=special)["input_ids"]

    def _loglikelihood_tokens(self, requests, **options) -> list[tuple[float, bool]]:
        found = []
        for _, context, answer in requests:
            # A prompt of one token has no beginning; what stands for "no context" is repeated.
            prompt = context if len(context) > 1 else [*context, *context]
            prompt = shortened(prompt, self.max_length - len(answer))
            found.append(self.reader.log_likelihood(prompt, answer))
        return found

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        raise NotImplementedError(
            "a task must have a prompt that can be read densely; got log-likelihood of whole "
            "texts: "
            "for those run `saap eval --tasks perplexity`"
        )

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        return [self._answer(*request.args) for request in requests]

    def _answer(self, context: str, options: dict) -> str:
        if options.get("do_sample") and options.get("temperature", 1.0) > 0:
            raise ValueError("do_sample must be False, which is greedy decoding; got True")
        until = options.get("until") or []
        stops = [until] if isinstance(until, str) else until
        most = options.get("max_gen_toks") or DEFAULT_ANSWER
        prompt = shortened(self.tok_encode(context), self.max_length - most)

        def text_of(tokens: list[int]) -> str:
            return self.tokenizer.decode(tokens, skip_special_tokens=True)

        def finished(tokens: list[int]) -> bool:
            if tokens and tokens[-1] == self.tokenizer.eos_token_id:
                return True
            return any(stop and stop in text_of(tokens) for stop in stops)

        text = text_of(self.reader.generate(prompt, most, finished))
        for stop in filter(None, stops):
            text = text.split(stop)[0]
        return text
