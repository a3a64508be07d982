"""docs/commands.md is what the commands say of themselves; `make accept` writes it anew."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from mmq.__main__ import cli

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "commands.md"


def test_the_page_is_current() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "commands.py")], capture_output=True, text=True, timeout=60, check=True
    )
    if os.environ.get("MMQ_ACCEPT"):
        PAGE.write_text(done.stdout, encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == done.stdout, "options changed; `make accept` writes docs/commands.md"


def test_it_has_every_command_and_option() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for name, command in cli.commands.items():
        section = text.partition(f"\n## mmq {name}\n")[2].partition("\n## ")[0]
        assert section, name
        assert not [o for p in command.params for o in p.opts if o.startswith("--") and o not in section]
