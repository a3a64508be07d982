"""Ports of this machine and of others: which are free, and whether anybody listens. Asks nobody anything."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path


def free_port(host: str = "127.0.0.1") -> int:
    """A port of `host` that nobody listens on now."""
    with socket.socket(_family(host), socket.SOCK_STREAM) as s:
        s.bind((host, 0))
        return s.getsockname()[1]


def check_port(host: str, port: int) -> None:
    """ValueError when `port` of `host` cannot be listened on, naming it and the way out."""
    if not 0 < port < 65536:
        raise ValueError(f"port {port} is not between 1 and 65535")
    try:
        with socket.socket(_family(host), socket.SOCK_STREAM) as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            s.bind((host, port))
    except PermissionError:
        raise ValueError(f"port {port} needs root; give one above 1023 with --port") from None
    except socket.gaierror:
        raise ValueError(f"{host} is no address of this machine; --host 127.0.0.1 is the usual one") from None
    except OSError as e:
        raise ValueError(f"port {port} on {host} cannot be used ({e.strerror}); give another with --port") from None
    if _held(host, port):
        raise ValueError(f"port {port} on {host} is held by a server that is still starting; give another with --port")


def _held(host: str, port: int) -> bool:
    """Whether somebody has the port and does not listen yet, as vLLM while it loads: it lets a second one have it too
    (SO_REUSEADDR, and SO_REUSEPORT where it has several servers), of which whoever is up first would be asked.

    The kernel tells of no such socket; but without SO_REUSEADDR the port is refused, though no old connection has it.
    """
    with socket.socket(_family(host), socket.SOCK_STREAM) as s, contextlib.suppress(OSError):
        s.bind((host, port))
        return False
    try:
        rows = [row.split() for name in ("tcp", "tcp6") for row in Path(f"/proc/net/{name}").read_text().splitlines()]
    except OSError:
        return False
    return not any(row[1].endswith(f":{port:04X}") for row in rows)


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def listening(host: str, port: int) -> bool:
    """Whether somebody listens there; asks nothing."""
    try:
        with socket.create_connection((host, port), timeout=2.0):
            return True
    except OSError:
        return False
