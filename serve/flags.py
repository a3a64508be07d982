"""A launch: a command line, its environment, and a reason for each. Knows no engine's flags."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

LOOPBACK = ("127.0.0.1", "localhost", "::1")
SUFFIXES = {  # of numbers, as vLLM reads them: 32k is 32,000, and 32K is 32,768
    **{letter: 1000**power for power, letter in enumerate("kmgt", 1)},
    **{letter: 1024**power for power, letter in enumerate("KMGT", 1)},
}


@dataclass(frozen=True)
class Secret:
    """A value that is never shown, and the shell word that stands for it, as $NAME."""

    value: str = field(repr=False)
    source: str


@dataclass(frozen=True)
class Launch:
    """What starts a server. `env` holds only what is added to the caller's own environment.

    `reasons` pairs each flag and each variable, as typed, with why it is there; `url` is where the server will answer
    (without /v1), `name` the model's name in requests.
    """

    argv: tuple[str, ...]
    env: Mapping[str, str]
    reasons: tuple[tuple[str, str], ...]
    url: str
    name: str
    host: str
    port: int
    device: str  # cuda or cpu
    backend: str = ""  # which of an engine's own engines, where it has several
    serves: bool = True  # one of several machines that only computes answers at `url` through the first
    secrets: Mapping[str, Secret] = field(default_factory=dict)  # variables like `env`'s, which are shown by no one
    grace: float = 0.0  # seconds that requests under way have once the engine is told to end


@dataclass(frozen=True)
class Flag:
    """One engine flag and why; `value` is None for a switch, several words where the flag takes several; `aliases` are
    its other spellings."""

    name: str
    value: str | tuple[str, ...] | None
    why: str
    aliases: tuple[str, ...] = ()

    @property
    def words(self) -> list[str]:
        """As typed."""
        if self.value is None:
            return [self.name]
        return [self.name, *((self.value,) if isinstance(self.value, str) else self.value)]


def spelled(flag: str) -> str:
    """A flag's one spelling: underscores as dashes, no value, no key of its JSON (`--flag.key`), a `--no-` switch as
    the switch it turns off."""
    head = re.split("[=.]", flag, maxsplit=1)[0]
    if head.startswith("--"):
        head = "--" + head[2:].replace("_", "-")
        if head.startswith("--no-"):
            head = "--" + head[5:]
    return head


def given(extra: Sequence[str], *names: str) -> str | None:
    """The last value that `extra` gives to a flag of any of these names, "" for a bare switch, None when absent."""
    found = None
    for at, word in enumerate(extra):
        if word.startswith("-") and spelled(word) in names:
            if "=" in word:
                found = word.split("=", 1)[1]
            else:
                following = extra[at + 1] if at + 1 < len(extra) else "-"
                found = "" if re.match(r"-(?!\d)", following) else following
    return found


def switched(extra: Sequence[str], name: str) -> bool:
    """Whether `extra` turns a switch on, and not off again (`--no-`)."""
    words = [word for word in extra if spelled(word) == name]
    return bool(words) and not words[-1].startswith(("--no-", "--no_"))


def number(extra: Sequence[str], *names: str) -> float | None:
    """What `extra` gives to a numeric flag, None when absent or a word such as `auto`. ValueError when it is empty."""
    value = given(extra, *names)
    if value is None:
        return None
    if value == "":
        raise ValueError(f"{names[0]} after -- wants a number")
    try:
        return float(value.rstrip("kmgtKMGT")) * SUFFIXES.get(value[-1], 1)
    except ValueError:
        return None


def settings(extra: Sequence[str], *names: str) -> dict[str, Any]:
    """What `extra` gives to a flag that takes JSON, whole or key by key (`--flag.key value`, which takes the place of
    all that was given whole); {} where it gives nothing, or no JSON object."""
    dotted: dict[str, Any] = {}
    for at, word in enumerate(extra):
        flag, dot, keys = word.split("=", 1)[0].partition(".")
        if word.startswith("-") and dot and spelled(flag) in names:
            inner, (*path, last) = dotted, keys.rstrip("+").split(".")
            for key in path:
                if not isinstance(inner.get(key), dict):
                    inner[key] = {}
                inner = inner[key]
            inner[last] = parsed(given(extra[at : at + 2], spelled(flag)) or "")
    found = dotted or parsed(given(extra, *names) or "{}")
    return found if isinstance(found, dict) else {}


def parsed(word: str) -> Any:
    """A word as the JSON that it is, else itself."""
    try:
        return json.loads(word)
    except ValueError:
        return word


def whole(extra: Sequence[str], *names: str, other: int) -> int:
    """The whole number that `extra` gives to a flag, 0 too, else `other`."""
    found = number(extra, *names)
    return other if found is None else int(found)


def merged(flags: Iterable[Flag], extra: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Words and reasons: ours without those that `extra` gives too, then `extra` as it was typed."""
    theirs = {spelled(word) for word in extra if word.startswith("-")}
    words: list[str] = []
    reasons: list[tuple[str, str]] = []
    for flag in flags:
        if theirs & {flag.name, *flag.aliases}:
            continue
        words += flag.words
        reasons.append((shlex.join(flag.words), flag.why))
    if extra:
        reasons.append((shlex.join(extra), "yours, given after --"))
    return [*words, *extra], reasons


def host_reason(host: str) -> str:
    """Why the server listens at `host`."""
    return "only this machine can connect" if host in LOOPBACK else "you asked for it: other machines can connect"


def launch_of(
    head: Sequence[str],
    flags: Iterable[Flag],
    extra: Sequence[str],
    variables: Mapping[str, tuple[str, str]],
    environ: Mapping[str, str],
    *,
    host: str,
    port: int,
    name: str,
    device: str,
) -> Launch:
    """The launch of the command `head` with these flags and variables (name -> value, reason); what `extra` gives and
    what `environ` sets already wins over ours."""
    words, reasons = merged(flags, extra)
    env = {}
    for key, (value, why) in variables.items():
        if key in environ:
            reasons.append((f"{key}={environ[key]}", "as your environment sets it"))
        else:
            env[key] = value
            reasons.append((f"{key}={value}", why))
    reach = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    url = f"http://[{reach}]:{port}" if ":" in reach else f"http://{reach}:{port}"
    return Launch((*head, *words), env, tuple(reasons), url, name, host, port, device)


def shell_line(launch: Launch) -> str:
    """The launch as one line to paste into a shell: variables, then the command, quoted where needed."""
    variables = [f"{key}={shlex.quote(value)}" for key, value in launch.env.items()]
    variables += [f'{key}="{secret.source}"' for key, secret in launch.secrets.items()]
    return " ".join([*variables, shlex.join(launch.argv)])
