"""Serves requests as a scenario says, in a process of its own, and prints what came of it.

    SAAP_VLLM=... python tests/vllm/scenario.py '{"model": FOLDER, ...}'

Not a test: `test_engine.py` runs it with Saap and without.
"""

import json
import sys
from unittest import mock


def main(scenario: dict) -> dict:
    from vllm import LLM, SamplingParams

    if "backend" in scenario:
        from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

        import saap.vllm

        saap.vllm.register()  # once in a process: what comes here stays
        register_backend(AttentionBackendEnum.CPU_ATTN, scenario["backend"])
    llm = LLM(
        scenario["model"], dtype="float32", enforce_eager=True, seed=0,
        skip_tokenizer_init=True, disable_log_stats=False, **scenario["engine"],
    )  # fmt: skip
    engine = llm.llm_engine
    if scenario.get("no_choice"):
        from saap.vllm import cpu

        cpu.select_pages = mock.Mock(side_effect=ValueError("nothing can be chosen"))
    params = SamplingParams(
        temperature=scenario.get("temperature", 0.0), seed=7, n=scenario.get("n", 1),
        max_tokens=scenario["new"], ignore_eos=True, detokenize=False,
        logprobs=scenario.get("logprobs"),
    )  # fmt: skip
    waiting = sorted(enumerate(scenario["requests"]), key=lambda entry: entry[1]["step"])
    aborts = {step: name for name, step in scenario.get("aborts", {}).items()}
    found: dict[str, list] = {}
    step = 0
    while waiting or engine.has_unfinished_requests():
        while waiting and waiting[0][1]["step"] <= step:
            number, request = waiting.pop(0)
            prompt = {"prompt_token_ids": request["ids"]}
            engine.add_request(str(number), prompt, params)
        if step in aborts:
            engine.abort_request([aborts[step]])
        for output in engine.step():
            if output.finished:
                found[output.request_id] = [
                    {
                        "tokens": list(o.token_ids),
                        "logprobs": [
                            p[t].logprob for p, t in zip(o.logprobs, o.token_ids, strict=True)
                        ]
                        if o.logprobs
                        else None,
                    }
                    for o in sorted(output.outputs, key=lambda o: o.index)
                ]
        step += 1
    counts = {
        metric.name: metric.value
        for metric in llm.get_metrics()
        if metric.name in ("vllm:num_preemptions", "vllm:prefix_cache_hits")
    }
    return {"outputs": found, "steps": step, "counts": counts}


if __name__ == "__main__":
    print("\nRESULT " + json.dumps(main(json.loads(sys.argv[1]))))
