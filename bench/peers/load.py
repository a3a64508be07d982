"""vLLM's own load generator, kept running: the words of a `vllm bench serve` come in, a line goes out when it is done.

Importing vLLM takes longer than a short run of it, and its imports would disturb the server on a small machine: so it
is imported once, before the first run. Each line of standard input is a JSON list of words; each line out is
{"ready": true}, {"done": true} or {"error": "..."}. What the generator itself prints goes to standard error.
Runs in the environment that has vLLM, and imports nothing of mmq: python load.py

One thing is mended here. The generator takes the first message of a stream for the first token. That message is the
role alone: vLLM sends it with the first token, which costs a gap of nothing, but `transformers serve` sends it before
it has begun, so that its prefill would be told as time between tokens. `spoken` takes the choices out of such messages.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

import json
import os
import sys
import traceback

WORDS = ("content", "reasoning", "reasoning_content", "tool_calls")  # of a delta: what a token may be in


def spoken(message: str) -> str:
    """A message of a stream; one that tells a role or the usage, and not a word, without its choices: it is then no
    token to the generator, and its usage is read."""
    if '"role"' not in message and '"usage"' not in message:
        return message
    try:
        data = json.loads(message.removeprefix("data: "))
    except ValueError:  # a comment: the generator knows it
        return message
    choices = data.get("choices")
    delta = choices[0].get("delta", {}) if choices else {}
    if any(delta.get(name) for name in WORDS) or not (delta.get("role") or data.get("usage")):
        return message
    return "data: " + json.dumps({**data, "choices": []})


def main() -> None:
    sys.path[:] = sys.path[1:]  # packages before the scripts of their names
    out = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    from vllm.benchmarks.lib.endpoint_request_func import StreamedResponseHandler
    from vllm.benchmarks.serve import add_cli_args
    from vllm.benchmarks.serve import main as bench
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    plain = StreamedResponseHandler.add_chunk
    StreamedResponseHandler.add_chunk = lambda self, chunk_bytes: [spoken(m) for m in plain(self, chunk_bytes)]
    parser = FlexibleArgumentParser(prog="vllm bench serve")
    add_cli_args(parser)
    out.write('{"ready": true}\n')
    for line in sys.stdin:
        try:
            args = parser.parse_args(json.loads(line))
            assert args is not None
            bench(args)
            said: dict[str, object] = {"done": True}
        except (Exception, SystemExit) as e:  # the next run may do better
            traceback.print_exc()
            said = {"error": f"{type(e).__name__}: {e}"}
        out.write(json.dumps(said) + "\n")


if __name__ == "__main__":
    main()
