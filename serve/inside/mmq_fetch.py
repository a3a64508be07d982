"""Fetch a medium from the web, from where it may come: an allowed host, at a public address, without redirects.

The addresses of a host are looked up once, all of them are judged, and the connection goes to one of these: a name
that means another address a moment later (DNS rebinding) gains nothing. Proxies of the environment are not used, for
behind one nobody knows which address is reached.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import ipaddress
import re
import socket
import ssl
from typing import Any
from urllib.parse import quote, urlsplit

from mmq_media import FRAMES, MIME, as_data_url
from mmq_refused import Refused
from mmq_settings import Allowance, Settings

FETCH_SECONDS = 20.0  # for one medium, from its host's name to its last byte
CONNECT_SECONDS = 5.0  # for one of a host's addresses
LONGEST = 8192  # characters of a URL, as many as servers take
NAT64 = ipaddress.ip_network("64:ff9b::/96")
# public by Python's tables, of one version or all of them, and yet a machine's own secrets (Azure, Oracle) or nobody's
NEVER = [ipaddress.ip_network(n) for n in ("168.63.129.16/32", "192.0.0.0/24", "192.88.99.0/24", "fec0::/10")]


class Target:
    """A medium at a host that it may come from, and the connection to it, which another thread can end."""

    def __init__(self, url: str, settings: Settings) -> None:
        """Refused when the URL is odd, or its host is not among the allowed ones. Looks nothing up yet."""
        if len(url) > LONGEST:
            raise Refused(400, f"a medium's URL has {len(url)} characters, {LONGEST} at most: {url[:60]!r}")
        if re.search(r"[\x00-\x20\x7f\\]", url):
            raise Refused(400, f"a medium's URL has a space, a backslash or a control character: {url[:60]!r}")
        try:
            parts = urlsplit(url)
            host = (parts.hostname or "").rstrip(".")
            self.host = host if ":" in host else host.encode("idna").decode("ascii").lower()
            self.secure = parts.scheme.lower() == "https"
            self.port = parts.port or (443 if self.secure else 80)
        except (ValueError, UnicodeError):
            raise Refused(400, f"a medium's URL cannot be read: {url[:60]!r}") from None
        if not host or "@" in parts.netloc:
            raise Refused(400, f"a medium's URL has no host, or a user's name before it: {url[:60]!r}")
        if not among(self.host, settings.domains):
            how = "this server takes media by URL from the hosts that --media-domain names alone; send it as a data URL"
            raise Refused(400, f"media may not come from {self.host}: {how}")
        query = f"?{quote(parts.query, safe=_KEPT)}" if parts.query else ""
        self.path = quote(parts.path or "/", safe=_KEPT) + query
        self.networks = [ipaddress.ip_network(n, strict=False) for n in settings.networks]
        self.socket: socket.socket | None = None
        self.given_up = False

    def fetch(self, allowance: Allowance, kind: str) -> str:
        """The medium as a data URL; `kind` is image, video, audio or application. Refused when it does not come."""
        try:
            with self._connected() as plain:
                if plain.getsockname()[0] == plain.getpeername()[0] and not self._named(plain.getpeername()[0]):
                    raise Refused(400, f"{self.host} is this machine itself; media are not fetched from there")
                if not self.secure:
                    return self._asked(plain, allowance, kind)
                with _tls().wrap_socket(plain, server_hostname=self.host, do_handshake_on_connect=False) as wire:
                    self._hold(wire)
                    wire.do_handshake()
                    return self._asked(wire, allowance, kind)
        except (OSError, ValueError, http.client.HTTPException) as e:  # a wrong certificate is an OSError too
            raise Refused(400, f"{self.host} did not send the medium ({type(e).__name__})") from None

    def give_up(self) -> None:
        """End a fetch that runs in another thread: its wait would last as long as the host likes."""
        self.given_up = True
        if self.socket is not None:
            with contextlib.suppress(OSError):
                self.socket.shutdown(socket.SHUT_RDWR)

    def _hold(self, wire: socket.socket) -> None:
        """Make this the connection that is ended. ConnectionAbortedError where the fetch was given up before."""
        self.socket = wire
        if self.given_up:
            raise ConnectionAbortedError

    def _connected(self) -> socket.socket:
        """A connection to one of the host's addresses. Refused unless all of them may be reached."""
        if self.given_up:  # while it waited for a thread
            raise ConnectionAbortedError
        try:
            found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            raise Refused(400, f"no host {self.host} is known here") from None
        if not all(may_reach(str(address[0]), self.networks) for *_, address in found):
            how = "media come from there only where the server's --media-network names it"
            raise Refused(400, f"{self.host} is not on the public network; {how}")
        failed: OSError = ConnectionError("no address")
        for family, kind, protocol, _, address in found:
            wire = socket.socket(family, kind, protocol)
            try:
                self._hold(wire)
                wire.settimeout(CONNECT_SECONDS)
                wire.connect(address)
                self._hold(wire)
                wire.settimeout(FETCH_SECONDS)
                return wire
            except OSError as e:
                wire.close()
                failed = e
                if self.given_up:
                    break
        raise failed

    def _asked(self, wire: socket.socket, allowance: Allowance, kind: str) -> str:
        connection = http.client.HTTPConnection(self.host, self.port)
        connection.default_port = 443 if self.secure else 80  # Host then has the port only where it is another
        connection.sock = wire
        connection.request(
            "GET",
            self.path,
            headers={"User-Agent": "mmq-guard/1 (media for a model)", "Accept": "*/*", "Connection": "close"},
        )
        reply = connection.getresponse()
        if 300 <= reply.status < 400:
            there = (reply.headers.get("location") or "")[:200]
            raise Refused(400, f"{self.host} redirects to {there!r}: redirects are not followed, name the place itself")
        if reply.status != 200:
            raise Refused(400, f"{self.host} answered {reply.status} instead of the medium")
        chunks = []
        while chunk := reply.read(65536):
            allowance.take(len(chunk))
            chunks.append(chunk)
        if reply.length:  # bytes that were promised
            raise ConnectionError
        said = reply.headers.get_content_type()
        mime = said if said.startswith(f"{kind}/") and said != FRAMES else MIME[kind]
        return as_data_url(b"".join(chunks), mime, allowance)

    def _named(self, address: str) -> bool:
        return any(ipaddress.ip_address(address.partition("%")[0]) in network for network in self.networks)


_KEPT = "/%:=&?~+!$,;'@()*[]"  # of a path and a query; all else, Chinese above all, is percent-encoded


def may_reach(address: str, networks: list[Any]) -> bool:
    """Whether media may come from an IP address: a public one, or one of `networks`."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if ip in NAT64 else ip.ipv4_mapped or ip.sixtofour
        if inner is not None:
            return may_reach(str(inner), networks)
    if any(ip in network for network in networks):
        return True
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or any(ip in network for network in NEVER))


def among(host: str, domains: tuple[str, ...] | None) -> bool:
    """Whether a host is one of `domains`, or below one that begins with a dot; every host is where there are None."""
    return domains is None or any(host == d or (d.startswith(".") and host.endswith(d)) for d in domains)


@functools.cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()
