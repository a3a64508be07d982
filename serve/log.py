"""What an engine's log says: the lines that tell why it died, and the figures it reports. Knows text only."""

from __future__ import annotations

import re
from pathlib import Path

# "(EngineCore pid=5163) ERROR 11-21 01:53:06 [core.py:133] ", as vLLM begins its lines
_PREFIX = re.compile(r"^(?:\([^)]*pid=\d+\)\s?)?(?:(?:ERROR|CRITICAL|WARNING|INFO)\s[\d-]+\s[\d:.]+\s+\[[^\]]*\]\s?)?")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_ERROR = re.compile(r"^(?:[\w.]+\.)?\w*(?:Error|Exception)(?:: .*)?$")
_USAGE = re.compile(r"^\S+(?: \w+)*: error: .+")
_FRAME = re.compile(r'^\s*(?:Traceback|File "|During handling|The above exception|\^+$|~*\^+~*$)')
# what other processes of the engine say after the one that failed: true, and no help
_HOLLOW = (
    *("initialization failed", "see root cause above", "see stack trace for root cause", "engine process failed"),
    "enginecore encountered an issue",
)
_PYDANTIC = re.compile(
    r"(?:\S*ValidationError: \d+ validation errors? for \w+ )?(?:Value error, )?(.*?)(?: \[type=.*)?$"
)
_LOADED = re.compile(r"Model loading took ([\d.]+) GiB")
_ANSWERED = re.compile(r'"[A-Z]+ \S+ HTTP/[\d.]+" [1-4]\d\d\b.*')  # a request that did not fail for the server
_SILENT = "a process of the engine went without an error; most often the machine's memory was full, and it was killed"
TAIL = 4 << 20  # bytes of a log's end that are looked at
LONGEST = 400  # characters of one message; vLLM lists all its 300 architectures in one
SIGNALS = {
    -4: "an illegal instruction (SIGILL): this build of the engine uses instructions that the processor lacks",
    -6: "it aborted (SIGABRT)",
    -9: "it was killed (SIGKILL), most often because the machine ran out of memory",
    -11: "a segmentation fault (SIGSEGV)",
}


def plain_lines(text: str) -> list[str]:
    """The log's lines without the engine's prefixes, colours and progress bars; empty lines left out."""
    bare = (_PREFIX.sub("", line.split("\r")[-1]).rstrip() for line in _COLOUR.sub("", text).split("\n"))
    return [line for line in bare if line]


def useful_lines(text: str, *, most: int = 4) -> list[str]:
    """The lines of a dead engine's log that say why, at most `most`: its own error, not its traceback.

    The first real error is the cause; what the engine's other processes then say follows from it, and where they alone
    speak the first was killed. An error without words (a failed assertion) comes with the line of code that raised it.
    Without any error, the log's last lines.
    """
    lines = plain_lines(text)
    hollow = False
    for at, line in enumerate(lines):
        if _USAGE.match(line):
            return [line]
        if not _ERROR.match(line):
            continue
        if any(h in line.lower() for h in _HOLLOW):
            hollow = True
            continue
        if ": " not in line:
            before = [item.strip() for item in lines[max(0, at - 4) : at] if not _FRAME.match(item)]
            return [f"{line} at `{before[-1]}`" if before else line]
        kept = [line]
        for further in lines[at + 1 : at + most]:  # pydantic's messages go on, indented
            if further[:1] != " " or _FRAME.match(further):
                break
            kept.append(further.strip())
        return kept
    return [_SILENT] if hollow else lines[-most:]


def why_it_died(path: Path, *, returncode: int | None = None) -> str:
    """One line that says why the engine whose log is at `path` died. `returncode` as Popen's: negative is a signal.

    What stands before the last request that was answered, or refused, is older: an error there was that request's own.
    """
    text = _tail(path)
    if answered := list(_ANSWERED.finditer(text)):
        text = text[answered[-1].end() :]
    if returncode in SIGNALS and not any(_ERROR.match(line) for line in plain_lines(text)):
        return SIGNALS[returncode]
    said = " ".join(useful_lines(text))
    tidy = _PYDANTIC.match(said)
    said = tidy.group(1) if tidy else said
    return said if len(said) <= LONGEST else said[:LONGEST] + " ..."


def _tail(path: Path) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL))
            return file.read(TAIL).decode("utf-8", "replace")
    except OSError:
        return ""


def loaded_bytes(text: str) -> int | None:
    """Bytes of the device's memory that loading the weights took, as vLLM measured it on a GPU; None if not logged."""
    found = _LOADED.findall(text)
    return int(float(found[-1]) * (1 << 30)) if found else None
