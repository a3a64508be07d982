"""A task folder for lm-eval, made of pebble's drawn pictures: what somebody's own task looks like, and with answers
that are known."""

from __future__ import annotations

import json
from pathlib import Path

from mmq.bench.answers import question_of
from mmq.recipes.pebble.tasks import samples

NAME = "drawn_pictures"
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_image: !function pictures.of
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  until: []
  do_sample: false
  max_gen_toks: 64
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""
PICTURES = """\
from PIL import Image


def of(doc):
    return [Image.open(path).convert("RGB") for path in doc["images"]]
"""


def write_task(folder: Path, *, count: int) -> Path:
    """Write the task of `count` held-out samples, each of one question, into `folder`; its YAML file."""
    folder.mkdir(parents=True)
    lines = []
    for number, sample in enumerate(samples("test", count, tasks=("colour", "shape", "word", "digits", "several"))):
        paths = [folder / f"{number}-{at}.png" for at in range(len(sample.images))]
        for path, image in zip(paths, sample.images, strict=True):
            image.save(path)
        line = {"question": question_of(sample), "answer": sample.answer, "images": [str(path) for path in paths]}
        lines.append(json.dumps(line, ensure_ascii=False))
    data, task = folder / "samples.jsonl", folder / f"{NAME}.yaml"
    data.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    (folder / "pictures.py").write_text(PICTURES, encoding="utf-8")
    task.write_text(TASK.format(name=NAME, data=data), encoding="utf-8")
    return task
