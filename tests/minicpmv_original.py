"""What MiniCPM-V's original code makes of the cases, for tests/data/minicpmv: run in an environment of its time.

    python tests/minicpmv_original.py 2.6 FOLDER_WITH_THE_ORIGINAL_PY_FILES

with torch 2.6 and transformers 4.48 (4.51 for 4.5). None of the original's code is kept here: it is read from the
folder. Knows nothing of mmq.

2.5 writes its mask of padding along an axis of length one, so that all of it is True: beside a larger slice, a slice
sees its own padding and lies differently in the table of positions. Engines mask it (vLLM 0.32 does), and so does mmq.
So 2.5 is run twice, as it is and with the mask it means; how far the two are apart is told as `padding_seen`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import minicpmv_cases as cases
import numpy as np
import torch
import transformers
from safetensors.numpy import save_file


def unpacked(strip: torch.Tensor, patch: int = 14) -> np.ndarray:
    """The original's strip of patches, [3, p, patches * p], as [patches, 3, p, p]."""
    return strip.reshape(3, patch, -1, patch).permute(2, 0, 1, 3).contiguous().float().numpy()


def main(version: str, original: Path) -> None:
    out = Path(__file__).parent / "data" / "minicpmv"
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / f"tiny_{version.replace('.', '_')}"
        cases.checkpoint(version, folder)
        for path in original.glob("*.py"):
            shutil.copy(path, folder)
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
        model = transformers.AutoModel.from_config(config, trust_remote_code=True).float().eval()
        processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    state = {n: torch.from_numpy(cases.weight(n, tuple(p.shape))) for n, p in model.named_parameters()}
    model.load_state_dict(state, strict=False)

    sizes: list[Any] = []  # the slices' grids, for the mask that 2.5 means; empty to leave it as it is

    def meant(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        for row, (rows, columns) in enumerate(sizes):
            kwargs["patch_attention_mask"][row, :, rows * columns :] = False
        return args, kwargs

    if version == "2.5":
        model.vpm.register_forward_pre_hook(meant, with_kwargs=True)

    def run(prompt: str, pictures: list[Any], **options: Any) -> tuple[dict[str, Any], np.ndarray]:
        inputs = processor(prompt if version == "2.5" else [prompt], [pictures] if version != "2.5" else pictures,
                           return_tensors="pt", **options)  # fmt: skip
        inputs.pop("image_sizes", None)
        ids = inputs["input_ids"]
        inputs["position_ids"] = torch.arange(ids.shape[1])[None]
        with torch.no_grad():
            sizes.clear()
            logits = as_is = model(inputs).logits[0].float().numpy()
            if version == "2.5":
                sizes.extend(np.asarray(inputs["tgt_sizes"][0]).tolist())
                logits = model(inputs).logits[0].float().numpy()
        strips = [unpacked(p) for p in inputs["pixel_values"][0]]
        said = {
            "padding_seen": float(abs(logits - as_is).max()),
            "prompt": prompt,
            "input_ids": ids[0].tolist(),
            "tgt_sizes": np.asarray(inputs["tgt_sizes"][0]).reshape(-1, 2).tolist(),
            "pixels": [hashlib.sha256(s.tobytes()).hexdigest() for s in strips],
        }
        return said, logits

    told: dict[str, Any] = {"torch": torch.__version__, "transformers": transformers.__version__, "cases": {}}
    kept: dict[str, np.ndarray] = {}
    for case, names in cases.CASES.items():
        content = "\n".join([*(["(<image>./</image>)"] * len(names)), cases.QUESTION])
        prompt = processor.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        if version == "2.5" and not names:
            ids = torch.tensor([processor.tokenizer.encode(prompt)])
            inputs = {"input_ids": ids, "pixel_values": [[]], "tgt_sizes": [], "image_bound": [[]]}
            inputs["position_ids"] = torch.arange(ids.shape[1])[None]
            logits = model(inputs).logits[0].detach().numpy()
            said = {"prompt": prompt, "input_ids": ids[0].tolist(), "tgt_sizes": [], "pixels": [], "padding_seen": 0.0}
        else:
            said, logits = run(prompt, [cases.picture(name) for name in names])
        told["cases"][case] = said
        kept[case] = logits[-cases.SEEN :]
        kept[f"{case}.all"] = logits @ cases.numbers("echo", (logits.shape[1], 2)).astype(np.float32)
    if version == "4.5":
        name, count, groups = cases.VIDEO
        frames = [cases.picture(name, number=i) for i in range(count)]
        content = "\n".join([*(["(<image>./</image>)"] * count), cases.QUESTION])
        prompt = processor.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        for case, packed in (("video", None), ("packed", [[list(g) for g in groups]])):
            said, logits = run(prompt, frames, max_slice_nums=1, use_image_id=False, temporal_ids=packed)
            told["cases"][case] = said
            kept[case] = logits[-cases.SEEN :]
            kept[f"{case}.all"] = logits @ cases.numbers("echo", (logits.shape[1], 2)).astype(np.float32)
    save_file(kept, out / f"{version}.safetensors")
    (out / f"{version}.json").write_text(json.dumps(told, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
