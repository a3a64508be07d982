"""Run as a program in an environment with vLLM: what each folder thinks of its own prompts, as JSON.

    python family_twins.py REQUESTS.json OUT.json      REQUESTS: {folder: {"prompts": [...], "options": {...}}}

One process for all. After each folder the file is written anew, so that a crash costs one.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from twins import run

if __name__ == "__main__":
    asked = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    found = {}
    for folder, request in asked.items():
        start = time.monotonic()
        try:
            found[folder] = run(folder, request["prompts"], **request.get("options", {}))
        except Exception as e:
            found[folder] = {"error": f"{type(e).__name__}: {' '.join(str(e).split())[:500]}"}
        found[folder]["seconds"] = round(time.monotonic() - start, 1)
        Path(sys.argv[2]).write_text(json.dumps(found), encoding="utf-8")
