"""What a server lets in, who may ask it, and how it ends: options as the settings of the guard that stands before it.

The guard is inside/mmq_guard.py, which the engine loads into its own process; `guarded` adds it to any engine's launch.
A key goes by the environment alone: what is typed stands in `ps`, in shells' histories and in logs. Starts nothing.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .flags import LOOPBACK, Flag, Launch, Secret, given, spelled
from .inside.mmq_frames import TAKEN, asked

INSIDE = Path(__file__).resolve().parent / "inside"
MIB = 1 << 20
KEY_VARIABLES = ("MMQ_API_KEY", "VLLM_API_KEY")  # the first that is set is the key
TYPED_SECRETS = {  # engine flags that would show a secret, and what to do instead
    **dict.fromkeys(("--api-key", "--api-keys"), "set MMQ_API_KEY, or give --api-key-file FILE"),
    "--hf-token": "set HF_TOKEN",
}
NOT_OURS = {  # engine flags that put another server in the place of the one that the guard is a part of, or elsewhere
    "--grpc": "the guard judges HTTP alone; start vLLM itself for gRPC",
    "--uds": "mmq asks its server at --host and --port",
    **dict.fromkeys(
        ("--ssl", "--ssl-keyfile", "--ssl-certfile"), "mmq asks its server without TLS; put a proxy before it"
    ),
    "--config": "mmq reads none of it; write what it says after the --",
}
GUARDS_OWN = {  # engine flags that mmq's guard decides before the engine could
    "--allowed-local-media-path": "--media-folder",
    "--allowed-media-domains": "--media-domain",
}
NOBODY = "only.mmq.fetches.invalid"  # a domain that no URL has


@dataclass(frozen=True)
class Safety:
    """What a server lets in, and how it ends.

    `max_body`: bytes of a request, and of the media that it names together; `max_media`: how many it may have.
    `media_domains`: hosts that media may come from by URL, ("any",) for every public one, ("none",) for no URL at all,
    () for the default: any on loopback, none where other machines can ask. `media_networks`: private networks that
    they may come from as well. `media_folder`: where file:// may point, nowhere without. `api_key_file`: holds the key.
    `grace`: seconds that requests under way have after SIGTERM.
    """

    max_body: int = 64 * MIB
    max_media: int = 64
    media_domains: tuple[str, ...] = ()
    media_networks: tuple[str, ...] = ()
    media_folder: Path | None = None
    api_key_file: Path | None = None
    grace: float = 0.0

    def __post_init__(self) -> None:
        if self.max_body < 1 or self.max_media < 0 or self.grace < 0:
            raise ValueError("--max-body must be at least a byte, --max-media and --grace at least 0")
        for domain in self.media_domains:
            if not domain or set("/:@ ") & set(domain):
                raise ValueError(f"{domain!r} is no host; --media-domain wants a name as images.example.org, or any")
        for network in self.media_networks:
            try:
                ipaddress.ip_network(network, strict=False)
            except ValueError:
                raise ValueError(f"{network!r} is no network; --media-network wants one as 10.0.0.0/8") from None
        if self.media_folder is not None and not self.media_folder.expanduser().is_dir():
            raise ValueError(f"no folder {self.media_folder}, which --media-folder names")


USUAL = Safety()


def key_of(safety: Safety, environ: Mapping[str, str]) -> Secret | None:
    """The key that requests must have: the file's, else the environment's; None where there is none.

    OSError for a file that cannot be read, ValueError for a key that no HTTP header can carry.
    """
    if safety.api_key_file is not None:
        path = safety.api_key_file.expanduser().absolute()  # unresolved: `<(pass show key)` is a pipe without a name
        try:
            value = path.read_text(encoding="utf-8").strip()
        except UnicodeDecodeError:
            raise ValueError(f"{path} is not text; it must hold the API key and nothing else") from None
        except OSError as e:
            raise OSError(f"the API key's file {path} cannot be read: {e.strerror}") from None
        if not value and path.is_fifo():
            raise ValueError(f"{path} is a pipe that is empty, or was read already (--print reads twice); give a file")
        found, where = Secret(value, f"$(cat {shlex.quote(str(path))})"), str(path)
    else:
        name = next((name for name in KEY_VARIABLES if environ.get(name)), None)
        if name is None:
            return None
        found, where = Secret(environ[name], f"${name}"), name
    if not found.value or not all("!" <= c <= "~" for c in found.value):
        raise ValueError(f"the API key in {where} must be one word of ASCII letters, digits and signs")
    return found


def guarded(
    engine: str,
    launch: Launch,
    safety: Safety = USUAL,
    *,
    extra: Sequence[str] = (),
    environ: Mapping[str, str] = os.environ,
) -> Launch:
    """The launch with the guard before the engine, with the reasons. ValueError for an engine flag in `extra` that
    shows a secret, or asks past the guard."""
    _check_typed(extra)
    key = key_of(safety, environ)
    near = launch.host in LOOPBACK
    settings, why = _settings(safety, near=near, key=key)
    settings |= _frames(engine, extra)
    path = os.pathsep.join([str(INSIDE), *filter(None, [environ.get("PYTHONPATH")])])
    env = {"PYTHONPATH": path, "MMQ_GUARD": json.dumps(settings, ensure_ascii=False, separators=(",", ":"))}
    flags, variables = HOOKS[engine](environ) if engine in HOOKS else ((), {})
    env |= {name: value for name, (value, _) in variables.items()}
    reasons = [(shlex.join(flag.words), flag.why) for flag in flags]
    reasons.append((f"PYTHONPATH={path}", "where the guard is that judges every request before the engine sees it"))
    reasons.append((f"MMQ_GUARD={env['MMQ_GUARD']}", why))
    reasons += [(f"{name}={value}", reason) for name, (value, reason) in variables.items()]
    if key is not None:
        reasons.append(("the API key", f"asked for of every request, but for /health; it is {key.source}"))
    elif not near:
        remedy = "set MMQ_API_KEY, or give --api-key-file FILE"
        reasons.append(("no API key", f"WARNING: every machine that reaches this port can use the model; {remedy}"))
    return replace(
        launch,
        argv=(*launch.argv, *(word for flag in flags for word in flag.words)),
        env={**launch.env, **env},
        secrets={} if key is None else dict.fromkeys(KEY_VARIABLES, key),
        reasons=(*launch.reasons, *reasons),
        grace=safety.grace,
    )


def _check_typed(extra: Sequence[str]) -> None:
    for word in extra:
        if not word.startswith("-"):
            continue
        name = spelled(word)
        if (secret := _meant(name, TYPED_SECRETS)) and given(extra, name):
            remedy = TYPED_SECRETS[secret]
            raise ValueError(f"{secret} on a command line is seen by everybody on this machine; {remedy}")
        if name in ("--host", "--server-name") and not given(extra, name):
            raise ValueError(f"{name} after -- wants an address; 0.0.0.0 lets every machine connect")
        if own := _meant(name, GUARDS_OWN):
            raise ValueError(f"{own} is decided before the engine; give {GUARDS_OWN[own]}, before the --")
        if other := _meant(name, NOT_OURS):
            raise ValueError(f"{other} does not go with mmq: {NOT_OURS[other]}")


def _meant(name: str, flags: Iterable[str]) -> str | None:
    """Which of these a flag is: engines take their beginnings too (`--api-k`)."""
    return next((flag for flag in flags if len(name) > len("--x") and flag.startswith(name)), None)


def _settings(safety: Safety, *, near: bool, key: Secret | None) -> tuple[dict[str, Any], str]:
    """The guard's settings as JSON has them, and what they come to in words."""
    named = [_domain(domain) for domain in safety.media_domains]
    domains: list[str] | None = [] if not near else None
    if named:
        domains = None if "any" in named else [domain for domain in named if domain != "none"]
    settings: dict[str, Any] = {"max_body": safety.max_body, "max_media": safety.max_media, "domains": domains}
    if safety.media_networks:
        settings["networks"] = list(safety.media_networks)
    if safety.media_folder is not None:
        settings["folder"] = str(safety.media_folder.expanduser().resolve())
    if near and key is None:
        settings["hosts"] = list(LOOPBACK)
    places = "any public host" if domains is None else ", ".join(domains) or "no host (--media-domain names some)"
    files = f", file:// from {settings['folder']}" if safety.media_folder is not None else ""
    size = f"{safety.max_body / MIB:g} MiB and {safety.max_media} media a request"
    return settings, f"{size}; media by URL from {places}{files}"


def _frames(engine: str, extra: Sequence[str]) -> dict[str, Any]:
    """The guard's setting of how many frames the engine takes of a video, {} where that is vLLM's usual."""
    usual = TAKEN[engine]
    typed = given(extra, "--media-io-kwargs") or ""
    with contextlib.suppress(ValueError):  # written in another way, or for the engine to refuse
        said = json.loads(typed)
        video = said.get("video") if isinstance(said, dict) else None
        if isinstance(video, dict):
            usual = asked(usual, {"num_frames": usual.spread, **video})
    return {} if usual == TAKEN["vllm"] else {"frames": asdict(usual)}


def _domain(name: str) -> str:
    """As the guard compares it: lower case, ASCII, `*.x` as `.x`."""
    name = name.lower().rstrip(".").removeprefix("*")
    dot = "." if name.startswith(".") else ""
    try:
        return dot + name.removeprefix(".").encode("idna").decode("ascii")
    except UnicodeError:
        raise ValueError(f"{name!r} is no host's name") from None


Hook = Callable[[Mapping[str, str]], tuple[tuple[Flag, ...], dict[str, tuple[str, str]]]]


def _vllm(environ: Mapping[str, str]) -> tuple[tuple[Flag, ...], dict[str, tuple[str, str]]]:
    if environ.get("VLLM_USE_RUST_FRONTEND", "0") not in ("", "0"):
        raise ValueError("VLLM_USE_RUST_FRONTEND replaces the server that the guard is a part of; unset it")
    flags = (
        Flag("--middleware", "mmq_guard.Guard", "the guard, in the server's own process"),
        Flag("--allowed-media-domains", NOBODY, "the guard fetches media from where they may come; the engine none"),
    )
    return flags, {"VLLM_MEDIA_URL_ALLOW_REDIRECTS": ("0", "a picture that moved is not followed to anywhere")}


# flags and variables (name -> value, reason) that an engine needs besides; other programs load the guard themselves
HOOKS: dict[str, Hook] = {"vllm": _vllm}
