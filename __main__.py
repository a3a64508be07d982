"""The command line: the commands together, and what becomes of errors: one line, and a code.

Exit codes: 0 done; 1 measured and past a limit; 2 input, files or hub; 3 an engine died; 70 a fault of ours;
130 interrupted.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
from pathlib import Path
from typing import NoReturn

import click

from . import __version__
from .commands import app, bench, check, convert, doctor, infer, plan, publish, quantize, recipes, report, run, serve
from .commands.terminal import until_left

NEXT = {
    errno.ENOSPC: "; make room and run it again, what is finished is kept",
    errno.EROFS: "; nothing can be written there: name another folder",
    errno.EACCES: "; it is another user's: let yourself in, or name another folder",
}


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="mmq")
def cli() -> None:
    """From a vision-language checkpoint to an int4 artifact that is proven, served and measured.

    MODEL is a recipe's name (`mmq recipes`), a local folder or a hub id.
    """


for one in (recipes, quantize, check, convert, plan, serve, infer, app, bench, report, publish, run, doctor):
    one.command.callback = until_left(one.command.callback)
    cli.add_command(one.command)


def fail(message: str, code: int) -> NoReturn:
    """One red line, and out; a file's name or content in it moves no cursor."""
    from .recipes.plain import shown

    line = shown(message)
    click.secho(f"mmq: {line if len(line) <= 4000 else f'{line[:2000]} ... {line[-1000:]}'}", fg="red", err=True)
    sys.exit(code)


def said(error: Exception) -> str:
    """An error in words; the system's own say what is wrong with which file, and here what to do next."""
    if not isinstance(error, OSError) or not error.errno or not error.strerror:
        return " ".join(str(error).split())
    where = f"{error.filename}: " if error.filename is not None else ""
    return f"{where}{error.strerror}{NEXT.get(error.errno, '')}"


def part() -> NoReturn:
    """End a process that torchrun started, without the interpreter's own end: gloo's threads do not always survive it,
    and torchrun would call a finished run failed."""
    from .quantize import ranks

    ranks.leave()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def main() -> None:
    """Run the command line; library errors become one line (MMQ_DEBUG=1 shows where they came from)."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # the caller has closed it
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115
    try:
        cli(standalone_mode=False)
        if os.environ.get("TORCHELASTIC_RUN_ID"):
            part()
    except click.ClickException as e:
        e.show()
        sys.exit(e.exit_code)
    except (click.Abort, KeyboardInterrupt):
        kept = "what is finished is kept: quantize, infer, bench, publish and run go on from there if started again"
        fail(f"interrupted; {kept}", 130)
    except RecursionError:  # a file within a file within a file; what of ours would do so is a fault as well
        if os.environ.get("MMQ_DEBUG"):
            raise
        fail("something in the input is nested too deep (MMQ_DEBUG=1 shows where it was read)", 2)
    except (ValueError, OSError, RuntimeError) as e:
        if os.environ.get("MMQ_DEBUG"):
            raise
        if type(e).__name__ == "OutOfMemoryError":
            fail(f"the GPU's memory is full; fewer --samples or --device cpu need less ({str(e).split('.')[0]})", 2)
        fail(said(e), 3 if isinstance(e, RuntimeError) else 2)
    except Exception:  # a fault of ours: its traceback, and a code that no measurement uses
        traceback.print_exc()
        fail("this is a fault in mmq; please report it with the lines above", 70)


if __name__ == "__main__":
    main()
