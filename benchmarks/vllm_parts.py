"""The parts of `benchmarks.vllm`: each runs in a process that holds one engine of vLLM."""

import json
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from vllm import LLM, SamplingParams
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

from saap.eval.corpora import read_named
from saap.eval.tasks.asking import prompts_of_tokens
from saap.eval.tasks.passkey import is_right, make_prompts, wording_of
from saap.vllm import cpu
from saap.vllm import decode as plugin
from saap.vllm.cpu import SaapCpuBuilder, SaapCpuImpl
from saap.vllm.options import Options

LLAMA_SHAPE = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 1024,
    "intermediate_size": 1024, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 128, "num_hidden_layers": 4, "vocab_size": 1024, "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "max_position_embeddings": 131072, "hidden_act": "silu",
    "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip


def run_part(part: str, options) -> list[dict]:
    if part == "long":
        with TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(LLAMA_SHAPE))
            return long(folder, options)
    own = {"speed": speed, "recall": recall, "passkeys": pass_keys}[part]
    return own(options.model, options)


def engine(folder: str, most: int, **settings) -> LLM:
    return LLM(
        folder, dtype="float32", enforce_eager=True, max_model_len=most,
        max_num_batched_tokens=2048, seed=0, disable_log_stats=True, **settings,
    )  # fmt: skip


def stock() -> ExitStack:
    """Within, decode steps are vLLM's own and nothing of Saap runs."""
    stack = ExitStack()
    own = CPUAttentionBackendImpl.do_kv_cache_update
    stack.enter_context(mock.patch.object(SaapCpuBuilder, "_plan", return_value=None))
    stack.enter_context(mock.patch.object(SaapCpuImpl, "do_kv_cache_update", own))
    return stack


def decode(llm: LLM, prompts: list[list[int]], steps: int, *, name: str) -> list[float]:
    """Seconds of each step in which all requests decode. Prompts are read before, or cached."""
    own = llm.llm_engine
    params = SamplingParams(temperature=0, max_tokens=steps + 1, ignore_eos=True)
    for i, ids in enumerate(prompts):
        own.add_request(f"{name}-{i}", {"prompt_token_ids": ids}, params)
    done: dict[str, int] = {}
    seconds = []
    while own.has_unfinished_requests():
        all_decode = len(done) == len(prompts) and all(done.values())
        begin = time.perf_counter()
        outputs = own.step()
        if all_decode:
            seconds.append(time.perf_counter() - begin)
        for output in outputs:
            done[output.request_id] = len(output.outputs[0].token_ids)
    return seconds


class Stopwatch:
    """Seconds within some functions of the back-end, of each call."""

    def __init__(self):
        self.calls: dict[str, list[float]] = {}

    def around(self, name: str, function):
        own = self.calls.setdefault(name, [])

        def timed(*args, **kwargs):
            begin = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                own.append(time.perf_counter() - begin)

        return timed


def taking_turns(llm: LLM, prompts: list[list[int]], options) -> dict:
    """Milliseconds of a step, stock and sparse; of these, what choosing pages and coding take."""
    found = {"stock": [], "saap": []}
    for turn in range(3):
        with stock():
            found["stock"] += decode(llm, prompts, options.steps, name=f"stock-{turn}")
        found["saap"] += decode(llm, prompts, options.steps, name=f"saap-{turn}")
    watch = Stopwatch()
    choose = watch.around("choose", SaapCpuImpl.choose_pages)
    write = watch.around("code", plugin.write_codes)
    with (
        mock.patch.object(SaapCpuImpl, "choose_pages", choose),
        mock.patch.object(plugin, "write_codes", write),
    ):
        decode(llm, prompts, options.steps, name="watch")
    layers = llm.llm_engine.model_config.hf_text_config.num_hidden_layers
    # Of calls that differ only in luck the median: other processes may run beside.
    choosing, coding = (1000 * layers * median(watch.calls[name]) for name in ("choose", "code"))
    times = {name: 1000 * median(own) for name, own in found.items()}
    return {
        "stock_ms": times["stock"],
        "saap_ms": times["saap"],
        "ratio": times["stock"] / times["saap"],
        "choosing_ms": choosing,
        "coding_ms": coding,
    }


def text_of(llm: LLM) -> list[int]:
    return llm.get_tokenizer()(corpus().decode(errors="ignore"))["input_ids"]


def corpus() -> bytes:
    return b"\n".join(read_named("prose2"))


def speed(folder: str, options) -> list[dict]:
    llm = engine(folder, 8192)
    ids = text_of(llm)
    records = []
    for context in options.contexts or (2048, 4096, 7900):
        for batch in options.batches:
            prompts = [ids[i * 1000 : i * 1000 + context] for i in range(batch)]
            decode(llm, prompts, 0, name="read")
            records.append(
                {"context": context, "batch": batch, **taking_turns(llm, prompts, options)}
            )
    return records


def long(folder: str, options) -> list[dict]:
    llm = engine(folder, 131072, load_format="dummy", skip_tokenizer_init=True)
    rng = np.random.default_rng(0)
    records = []
    for context in options.contexts or (32768, 65536, 130000):
        prompts = [rng.integers(2, 1024, context).tolist()]
        with mock.patch.object(SaapCpuImpl, "forward", without_attention):
            decode(llm, prompts, 0, name="read")
        records.append({"context": context, "batch": 1, **taking_turns(llm, prompts, options)})
    return records


def without_attention(impl, layer, query, key, value, kv_cache, metadata, output, **_):
    return output.zero_()


class Mass:
    """What the visited pages hold of each query head's attention, added up."""

    def __init__(self, sinks: int, window: int):
        self.sinks, self.window = sinks, window
        self.sums = torch.zeros(5, dtype=torch.float64)
        self.pages = [0, 0]

    def look(self, impl, layer, query, cache, codes, plan, table, lens, output):
        chosen = impl.choose_pages(query, codes, plan, table, lens)
        blocks, heads, page, _ = cache.shape
        halves = cache.view(blocks, heads, 2 * page, -1)
        keys = halves[:, :, :page].reshape(blocks, heads, -1, page)
        q = query.unflatten(1, (heads, -1))
        for r, n in enumerate(lens.tolist()):
            own = table[r, : -(-n // page)].long()
            kept = min(int(plan.keep[r]), len(own))
            for h in range(heads):
                scores = torch.einsum("gd,pdn->gpn", q[r, h], keys[own, h]).flatten(1)[:, :n]
                weights = (scores * impl.scale).softmax(-1).sum(0)
                visited = chosen[r * heads + h, :kept] // heads
                seen = torch.isin(own, visited).repeat_interleave(page)[:n]
                self.add(weights, seen, page, kept)

    def add(self, weights: Tensor, seen: Tensor, page: int, kept: int) -> None:
        n = len(weights)
        middle = torch.zeros(n, dtype=torch.bool)
        middle[self.sinks : n - self.window] = True
        of_page = torch.zeros(-(-n // page) * page)
        of_page[:n] = weights
        best = of_page.view(-1, page).sum(-1).topk(kept).values.sum()
        self.sums += torch.stack([
            weights.sum(), weights[seen].sum(), weights[middle].sum(),
            weights[middle & seen].sum(), best,
        ]).double()  # fmt: skip
        self.pages = [self.pages[0] + kept, self.pages[1] + len(of_page) // page]

    def record(self) -> dict:
        whole, seen, middle, seen_middle, best = self.sums.tolist()
        return {
            "visited": self.pages[0] / self.pages[1],
            "recall_all": seen / whole,
            "recall_middle": seen_middle / middle,
            "best_pages_recall_all": best / whole,
        }


def recall(folder: str, options) -> list[dict]:
    llm = engine(folder, 8192)
    ids = text_of(llm)
    records = []
    attend = SaapCpuImpl.attend_sparsely
    for context in options.contexts or (4096, 7900):
        for share in (0.05, 0.1, 0.2):
            chosen = Options(share, dense_below=0)
            mass = Mass(chosen.sinks, chosen.window)

            def measured(impl, *args, mass=mass):
                mass.look(impl, *args)
                attend(impl, *args)

            with (
                mock.patch.object(SaapCpuImpl, "attend_sparsely", measured),
                mock.patch.object(cpu, "make_plan", planned_with(chosen)),
            ):
                for at in (0, 20000):
                    decode(llm, [ids[at : at + context]], 8, name=f"recall-{share}")
            records.append({"context": context, "budget": share, **mass.record()})
    return records


def planned_with(options):
    original = cpu.make_plan
    return lambda lens, _, shape: original(lens, options, shape)


def pass_keys(folder: str, options) -> list[dict]:
    llm = engine(folder, 8192)
    tokenizer = llm.get_tokenizer()
    wording, text = wording_of(tokenizer), corpus()
    params = SamplingParams(temperature=0, max_tokens=wording.answer_tokens)
    right = {"stock": 0, "saap": 0}
    for number in range(options.prompts):
        depth = (number + 0.5) / options.prompts * 0.95

        def make(n_bytes, number=number, depth=depth):
            rng = np.random.default_rng(number)
            return make_prompts(text, n_bytes, rng, depth=depth, wording=wording)

        prompt, *_ = prompts_of_tokens(make, tokenizer, 8192 - 24, len(text))
        ids = tokenizer(prompt.text.decode())["input_ids"]
        for name in ("saap", "stock"):
            with stock() if name == "stock" else ExitStack():
                (done,) = llm.generate([{"prompt_token_ids": ids}], params, use_tqdm=False)
            right[name] += is_right(prompt, done.outputs[0].text.encode())
    return [{"prompts": options.prompts, **right}]
