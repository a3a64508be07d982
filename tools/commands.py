"""docs/commands.md on stdout: the help page of every command, from the commands themselves. `make accept` writes it."""

from __future__ import annotations

from typing import Any

import click

from mmq.__main__ import cli

WIDTH = 100  # characters of a line
HEAD = """\
# Every command

What `mmq COMMAND --help` says. Written by `make accept` from the commands themselves, and compared by
tests/test_commands_page.py.
"""


def page() -> str:
    """The whole file."""
    wide: dict[str, Any] = {"terminal_width": WIDTH, "max_content_width": WIDTH}
    top = click.Context(cli, info_name="mmq", **{**cli.context_settings, **wide})
    sections = [HEAD, block("mmq", cli.get_help(top))]
    for name in sorted(cli.commands):
        command = cli.commands[name]
        within = click.Context(command, info_name=name, parent=top, **wide)
        sections.append(block(f"mmq {name}", command.get_help(within)))
    return "\n".join(sections)


def block(title: str, text: str) -> str:
    """One command's section."""
    return f"## {title}\n\n```\n{text}\n```\n"


if __name__ == "__main__":
    print(page(), end="")
