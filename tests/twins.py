"""Run as a program in an environment with vLLM: what several folders think of given answers, as JSON.

    python twins.py REQUESTS.json OUT.json      REQUESTS: {"folders": [...], "prompts": [{"prompt", "answer", "image"}]}

For each prompt the logprobs of the answer's tokens, where a model has been trained to speak; what it thinks of the
user's words is large noise. Each request runs alone, so that batching changes nothing.

One process for all, since importing vLLM takes longer than loading a small model.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_INT4_W4A8": "0",  # with 8-bit activations nothing would be exact
    "TORCHDYNAMO_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}


@functools.cache
def imported() -> None:
    """Import what all models need, and keep it out of the garbage's way: vLLM collects eight times for each model, and
    to look through a million objects of modules each time is half of what a small one costs."""
    import transformers  # noqa: F401
    import vllm.entrypoints.llm  # noqa: F401

    gc.collect()
    gc.freeze()
    gc.freeze = gc.unfreeze = lambda: None  # vLLM would freeze each model, and then thaw all of it


def run(folder: str, prompts: list[dict], **options: Any) -> dict:
    imported()
    import torch
    from PIL import Image
    from vllm import LLM, SamplingParams

    # float16: eight times less noise of arithmetic than bfloat16, so that what is left is the weights
    settings: dict[str, Any] = {
        "max_model_len": 1024,
        "enforce_eager": True,
        "max_num_seqs": 1,
        "seed": 0,
        "dtype": "float16",
    }
    if torch.cuda.is_available():  # a small part of the card, whatever else is on it and was before
        settings |= {"gpu_memory_utilization": 0.2, "kv_cache_memory_bytes": 2**28}
    llm = LLM(folder, **(settings | options))
    params = SamplingParams(temperature=0, max_tokens=24, prompt_logprobs=0)
    requests = []
    for p in prompts:
        request = {"prompt": p["prompt"] + p["answer"]}
        if p.get("image"):
            request["multi_modal_data"] = {"image": Image.open(p["image"]).convert("RGB")}
        requests.append(request)
    found = []
    words = llm.get_tokenizer()
    for p, out in zip(prompts, llm.generate(requests, params, use_tqdm=False), strict=True):
        count = len(words.encode(p["answer"], add_special_tokens=False))
        assert out.prompt_logprobs
        logprobs = [next(iter(entry.values())).logprob for entry in out.prompt_logprobs[-count:] if entry]
        found.append({"logprobs": logprobs, "tokens": list(out.outputs[0].token_ids)})
    model = llm.llm_engine.model_executor.driver_worker.model_runner.model
    packed = sum(1 for n, _ in model.named_parameters() if "qweight" in n or "weight_packed" in n or "absmax" in n)
    del llm, model
    gc.collect()
    return {"outputs": found, "packed": packed}


if __name__ == "__main__":
    asked = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    answers = {}
    for folder in asked["folders"]:
        try:
            answers[folder] = run(folder, asked["prompts"], **asked.get("options", {}))
        except Exception as e:
            answers[folder] = {"error": f"{type(e).__name__}: {e}"}
    Path(sys.argv[2]).write_text(json.dumps(answers), encoding="utf-8")
