"""Ask a server of pebble about pictures it was never trained on, as any program would: through the openai client.

The pictures are drawn from the test split, so the right answer is known and shown beside the model's.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from openai import APIConnectionError, APIError, OpenAI

from mmq.recipes.pebble.tasks import exact, samples
from mmq.recipes.samples import as_openai

TASKS = ("describe", "word")  # each in English, then each in Chinese
START_TIMEOUT = 300  # seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url", help="the server's address, as in http://127.0.0.1:8000/v1")
    parser.add_argument("--wait", type=int, metavar="PID", help="wait until the server is up, while process PID lives")
    parser.add_argument("--pictures", type=Path, default=Path("bench-results"), help="where to keep the pictures")
    options = parser.parse_args()

    client = OpenAI(base_url=options.url, api_key="none", max_retries=0)
    try:
        if options.wait:
            wait_until_up(client, options.wait)
        model = client.models.list().data[0].id
        ask_all(client, model, options.pictures)
    except (RuntimeError, APIError) as error:
        print(f"ask: {error}", file=sys.stderr)
        return 3
    return 0


def wait_until_up(client: OpenAI, pid: int) -> None:
    """Return when the server lists its models; RuntimeError when its process ends first, or after START_TIMEOUT."""
    end = time.monotonic() + START_TIMEOUT
    while time.monotonic() < end:
        try:
            client.models.list()
            return
        except APIConnectionError:
            time.sleep(1)
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            raise RuntimeError("the server ended before it was up") from None
    raise RuntimeError(f"the server was not up after {START_TIMEOUT} s")


def ask_all(client: OpenAI, model: str, folder: Path) -> None:
    """Ask each sample's question, print the answer as it streams, and the right one beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, sample in enumerate(samples("test", 2 * len(TASKS), tasks=TASKS), start=1):
        path = folder / f"picture-{number}.png"
        sample.images[0].save(path)
        question = as_openai(sample.question)
        print(f"\n{path}: {question[-1]['content'][-1]['text']}\n{model}: ", end="", flush=True)
        pieces = client.chat.completions.create(
            model=model,
            messages=question,  # pyright: ignore[reportArgumentType]
            stream=True,
            temperature=0,
            max_tokens=128,
        )
        text = ""
        for piece in pieces:
            new = piece.choices[0].delta.content or "" if piece.choices else ""
            text += new
            print(new, end="", flush=True)
        print("\n(exact)" if exact(sample, text) else f"\n(the picture's answer: {sample.answer})")


if __name__ == "__main__":
    sys.exit(main())
