"""Make pebble again from a seed: `python -m mmq.recipes.pebble.train --out DIR --minutes 8.5 --seed 0`.

Writes DIR/model (the checkpoint), DIR/trained (the same before `outliers`, for --start), DIR/train.log, DIR/loss.png
and DIR/README.md (the model card, with every task's exact answers on the test split). Wants a GPU and a dozen cores
that draw; runs on a CPU too, slowly.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from . import checkpoint, muon, outliers
from .batches import NAMES, batch
from .card import card, plot
from .measure import answers, rounding_loss, scores
from .network import logits
from .tasks import samples

Say = Callable[[str], None]
REPORTED = ("minutes", "seed", "rate", "small_rate")  # options the model card repeats


def split(model: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The matrices inside the blocks, which Muon moves, and the rest (embedding, norms, biases, patches) for AdamW."""
    named = dict(model.named_parameters())
    matrices = [p for name, p in named.items() if p.ndim == 2 and "embed" not in name]
    return matrices, [p for name, p in named.items() if p.ndim != 2 or "embed" in name]


def pace(done: float) -> float:
    """The learning rate as a share of its peak at `done` of the run in [0, 1]: up, level, straight down to nothing."""
    return min(1.0, done / 0.02 + 0.01, max(0.0, (1 - done) / 0.55))


def noisy(data: dict[str, torch.Tensor], *, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Half of the batches get a little pixel noise, so that encoded pictures and video read as clean ones do."""
    if torch.rand((), generator=generator) < 0.5:
        return data
    frames = data["frames"].float()
    frames = frames + torch.randn_like(frames) * 6 * torch.rand((), generator=generator).item()
    return {**data, "frames": frames.round().clamp(0, 255).to(torch.uint8)}


def train(model: Any, handler: Any, args: argparse.Namespace, say: Say) -> tuple[int, list[tuple[float, float]]]:
    """Train in place for the given minutes (or steps); the steps made and the curve as (seconds, loss)."""
    device = next(model.parameters()).device
    on_gpu = device.type == "cuda"
    make: Any = partial(batch, seed=args.seed, rows=args.rows, tokenizer=args.out / "model" / "tokenizer.json")
    loader = torch.utils.data.DataLoader(
        range(10**9),  # pyright: ignore[reportArgumentType]
        batch_size=None,
        collate_fn=make,
        num_workers=args.workers,
        prefetch_factor=4 if args.workers else None,
        pin_memory=on_gpu,
    )
    matrices, rest = split(model)
    groups, momentum = muon.by_shape(matrices), {}
    adam = torch.optim.AdamW(rest, lr=args.small_rate, weight_decay=0.0, betas=(0.9, 0.98), fused=on_gpu)
    masters = dict(model.named_parameters())
    # the passes run on copies in bfloat16; gradients go back to the float32 masters once a step
    weights = {name: p.detach().to(torch.bfloat16).requires_grad_() for name, p in masters.items()}
    generator = torch.Generator().manual_seed(args.seed)
    curve: list[tuple[float, float]] = []
    since, lost = 0, torch.zeros((), device=device)
    rights, totals = torch.zeros(2, len(NAMES), device=device)
    begun, waited, step, saved, parts = time.monotonic(), 0.0, 0, False, 0
    last = begun
    for data in loader:
        now = time.monotonic()
        waited += now - last
        data = {name: t.to(device, non_blocking=True) for name, t in data.items()}
        guessed = logits(weights, model.config, noisy(data, generator=generator))
        loss = F.cross_entropy(guessed, data["labels"])
        (loss / 2).backward()
        with torch.no_grad():
            right = (guessed.argmax(-1) == data["labels"]).float()
            whole = torch.ones(len(data["task"]), device=device).scatter_reduce(0, data["answer"], right, "amin")
            rights.index_add_(0, data["task"], whole)
            totals.index_add_(0, data["task"], torch.ones_like(whole))
            lost += loss.detach()
            since += 1
        parts += 1
        last = time.monotonic()
        if parts % 2:  # one step is a batch on a small canvas and one on a large
            continue
        for name, p in masters.items():
            p.grad, weights[name].grad = weights[name].grad.float(), None
        torch.nn.utils.clip_grad_norm_(masters.values(), 1.0)
        if not step:  # the clock starts once workers and kernels are warm
            begun, waited = time.monotonic(), 0.0
        seconds = time.monotonic() - begun
        done = step / args.steps if args.steps else seconds / (args.minutes * 60)
        adam.param_groups[0]["lr"] = args.small_rate * pace(done)
        adam.step()
        muon.step(groups, momentum, rate=args.rate * pace(done))
        with torch.no_grad():
            for name, p in masters.items():
                weights[name].copy_(p)
        step += 1
        if step % args.every == 0 or done >= 1:
            mean = (lost / since).item()
            curve.append((seconds, mean))
            share = (rights / totals.clamp(min=1)).tolist()
            told = " ".join(f"{name} {value:.3f}" for name, value in zip(NAMES, share, strict=True))
            rate = step * 2 * args.rows / max(seconds, 1e-9)
            head = f"step {step} {seconds:.0f}s loss {mean:.4f} rate {pace(done):.2f} {rate:.0f}/s wait {waited:.0f}s"
            say(f"{head} {told}")
            since = 0
            for t in (lost, rights, totals):
                t.zero_()
        if done >= 1 or (args.steps and step >= args.steps):
            break
        if done > 0.5 and not saved:
            saved = True
            checkpoint.save(model, handler, args.out / "trained")
        last = time.monotonic()
    return step, curve


def main() -> None:
    import matplotlib  # noqa: F401  (missing? say so before training, not after)

    parser = argparse.ArgumentParser(description="train pebble, the embedded model")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--minutes", type=float, default=8.5, help="of training; drawing, scoring and saving come after"
    )
    parser.add_argument("--steps", type=int, default=0, help="train this many steps instead")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=256, help="conversations a batch; a step is two batches")
    parser.add_argument("--rate", type=float, default=4e-3, help="Muon's peak learning rate")
    parser.add_argument("--small-rate", type=float, default=2e-3, help="AdamW's peak learning rate")
    parser.add_argument("--workers", type=int, default=max(0, (os.cpu_count() or 1) - 2))
    parser.add_argument("--every", type=int, default=100, help="steps between lines of the log")
    parser.add_argument("--tests", type=int, default=150, help="test questions a task")
    parser.add_argument("--start", type=Path, help="go on from this `trained` folder instead of random weights")
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    args.out.mkdir(parents=True, exist_ok=True)
    log = (args.out / "train.log").open("w", encoding="utf-8")

    def say(line: str) -> None:
        log.write(line + "\n")
        log.flush()
        print(line, flush=True)  # noqa: T201

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    if args.start:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        handler: Any = AutoProcessor.from_pretrained(args.start)
        model: Any = AutoModelForImageTextToText.from_pretrained(args.start, dtype=torch.float32)
    else:
        handler = checkpoint.processor(checkpoint.tokenizer(seed=args.seed))
        model = checkpoint.model(handler.tokenizer)
    handler.save_pretrained(args.out / "model")
    model.to(device)
    say(f"{sum(p.numel() for p in model.parameters())} parameters, {len(handler.tokenizer)} tokens, {device}")
    say(str(vars(args)))

    def tests(seed: int) -> Iterator[dict[str, torch.Tensor]]:
        words = args.out / "model" / "tokenizer.json"
        for i in range(8):
            data = batch(i, seed=seed, rows=32, tokenizer=words, split="test")
            yield {name: t.to(device) for name, t in data.items()}

    begun = time.monotonic()
    steps, curve = train(model, handler, args, say)
    minutes = (time.monotonic() - begun) / 60
    checkpoint.save(model, handler, args.out / "trained")
    clean = rounding_loss(model, tests(0))
    outliers.spread(model, seed=args.seed)
    checkpoint.save(model, handler, args.out / "model")
    given = [f"--{name.replace('_', '-')} {value}" for name, value in vars(args).items() if name in REPORTED]
    start = ["--start DIR/trained"] if args.start else []
    stage = {
        "command": " ".join(["python -m mmq.recipes.pebble.train --out DIR", *given, *start]),
        "steps": steps,
        "conversations": steps * 2 * args.rows,
        "minutes": minutes,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "curve": curve,
    }
    earlier = args.start.parent / "result.json" if args.start else None
    stages = [*(json.loads(earlier.read_text())["stages"] if earlier and earlier.is_file() else []), stage]
    plot(stages, args.out / "loss.png")
    say(f"trained for {minutes:.1f} minutes")

    asked = list(samples("test", args.tests * len(NAMES), seed=args.seed + 1))
    model.to(torch.bfloat16).eval()
    given = answers(model, handler, asked, rows=128 if device.type == "cuda" else 32)
    table = scores(asked, given)
    for task, row in table.items():
        say(f"{task}: en {row['en'][0]}/{row['en'][1]}, zh {row['zh'][0]}/{row['zh'][1]}")
    wrong = [(s, text) for s, text in zip(asked, given, strict=True) if s.answer != text]
    for s, text in wrong[:40]:
        say(f"  {s.task}: {s.messages[-2]['content'][-1]['text']} | {s.answer} | {text}")
    rounding = rounding_loss(model, tests(0))
    say(f"int4 rounding as trained {clean}")
    say(f"int4 rounding with outlier channels {rounding}")
    import PIL
    import tokenizers
    import transformers

    result = {
        "tasks": table,
        "exact": 1 - len(wrong) / len(asked),
        "clean": clean,
        "rounding": rounding,
        "parameters": sum(p.numel() for p in model.parameters()),
        "bytes": (args.out / "model" / "model.safetensors").stat().st_size,
        "stages": stages,
        "date": time.strftime("%Y-%m-%d"),
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"tokenizers {tokenizers.__version__}, Pillow {PIL.__version__}, Python {platform.python_version()}",
    }
    (args.out / "result.json").write_text(json.dumps(result, indent=1, ensure_ascii=False))
    (args.out / "README.md").write_text(card(result), encoding="utf-8")
    say(f"exact {100 * result['exact']:.2f}% of {len(asked)}; model {result['bytes'] / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
