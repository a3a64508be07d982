"""mmq report: a measurement's page, slide and model card section, anew from its report.json."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from .terminal import show_table


@click.command("report")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--png", is_flag=True, help="A picture for a slide, report.png, too.")
@click.option("--dark", is_flag=True, help="The picture for a dark slide.")
@click.option("--card", is_flag=True, help="Print the section for a model card, Markdown, and write nothing.")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Folder to write to.  [default: beside report.json]")
def command(path: Path, png: bool, dark: bool, card: bool, out: Path | None) -> None:
    """Draw PATH, a report.json of `mmq bench` or its folder, as report.html.

    The page is one file that loads nothing: send it, print it, put it on any server.
    """
    from ..bench.report import read_report

    report, folder = read_report(path), path if path.is_dir() else path.parent
    if card:
        from ..bench.section import card_section

        click.echo(card_section(report), nl=False)
        return
    from ..bench.page import write_page

    click.echo(f"page: {write_page(report, folder, out=out)}")
    if png or dark:
        from ..bench.slide import write_slide

        click.echo(f"picture: {write_slide(report, out or folder, dark=dark)}")


def show_history(folder: Path, *, as_json: bool) -> None:
    """What became of the newest report in `folder`; exit 1 for a regression."""
    from ..bench.history import facts, history, line, table

    found = history(folder)
    if as_json:
        click.echo(json.dumps(facts(found), ensure_ascii=False))
    else:
        if found.changes:
            show_table(*table(found))
        if found.alone:
            click.echo(f"nothing earlier to compare with: {', '.join(found.alone)}")
        click.echo(
            f"{found.reports} report{'s' if found.reports != 1 else ''}, the newest {found.newest} of {found.created}"
        )
    for change in found.regressions:
        click.echo(f"mmq: worse: {line(change)}", err=True)
    if found.regressions:
        sys.exit(1)
