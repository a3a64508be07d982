"""vLLM's own load generator, kept running: the words of a `vllm bench serve` come in, a line goes out when it is done.

Importing vLLM takes longer than a short run of it, and its imports would disturb the server on a small machine: so it
is imported once, before the first run. Each line of standard input is a JSON list of words; each line out is
{"ready": true}, {"done": true} or {"error": "..."}. What the generator itself prints goes to standard error.
Runs in the environment that has vLLM, and imports nothing of mmq: python load.py
"""
# pyright: reportMissingImports=false

from __future__ import annotations

import json
import os
import sys
import traceback

sys.path[:] = sys.path[1:]  # packages before the scripts of their names


def main() -> None:
    out = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    from vllm.benchmarks.serve import add_cli_args
    from vllm.benchmarks.serve import main as bench
    from vllm.utils.argparse_utils import FlexibleArgumentParser

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
