"""Run as a program in an environment with vLLM: what it thinks of prompts, as JSON.

    python minicpmv_vllm.py REQUESTS.json OUT.json
    REQUESTS: {"folder", "prompts": [{"prompt", "images": [file, ...]}]}; OUT: [{"ids", "logprobs"}, ...]

The folder's own Python is run: vLLM takes MiniCPM-V's config and processor from it.
"""

from __future__ import annotations

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


def main(asked: dict, out: Path) -> None:
    import torch

    if not torch.cuda.is_available():  # vLLM's resampler asks this on a CPU too, where torch raises
        torch.cuda.is_current_stream_capturing = lambda: False
    from PIL import Image
    from vllm import LLM, SamplingParams

    llm = LLM(
        asked["folder"], trust_remote_code=True, dtype="float16", max_model_len=1024, enforce_eager=True,
        max_num_seqs=1, limit_mm_per_prompt={"image": 2},
    )  # fmt: skip
    found = []
    for p in asked["prompts"]:
        request: Any = {"prompt": p["prompt"]}
        if p["images"]:
            request["multi_modal_data"] = {"image": [Image.open(path).convert("RGB") for path in p["images"]]}
        params = SamplingParams(temperature=0, max_tokens=8, prompt_logprobs=0)
        said = llm.generate([request], params, use_tqdm=False)[0]
        logprobs = [next(iter(entry.values())).logprob for entry in (said.prompt_logprobs or [])[1:] if entry]
        ids = list(said.prompt_token_ids or ())
        found.append({"ids": ids, "logprobs": logprobs, "answer": list(said.outputs[0].token_ids)})
    out.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2]))
