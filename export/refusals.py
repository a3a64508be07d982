"""What a hub's refusals mean for whoever publishes, in one line. Knows no hub's API."""

from __future__ import annotations

from .remote import Interrupted


def trouble(host: str, repo: str, what: str, status: int | None, told: str, login: str) -> OSError:
    """What an HTTP status (None: the connection was lost) means for whoever publishes, on any hub."""
    owner = repo.split("/")[0]
    said = {
        401: f"{host} refuses the token{told}: {login}",
        402: f"{host} wants payment for {repo}{told}: make room there, or publish to another owner",
        403: f"{host} does not let this token write to {repo}{told}: it needs write access to {owner}; {login}",
        404: f"{host} has no {repo} for this token{told}; check the owner's name, and {login}",
        409: f"{host} says that {repo} has changed meanwhile{told}; run again",
        412: f"{host} says that {repo} has changed meanwhile{told}; run again",
        413: f"{host} finds a file of {repo} too large{told}",
        429: f"{host} is asked too often{told}; wait some minutes and run again",
        507: f"{host} has no room left for {repo}{told}: make room there and run again",
    }
    if status is not None and status < 500:
        return OSError(said.get(status, f"{repo} could not be {what}: {host} answered {status}{told}"))
    if status in said:
        return OSError(said[status])
    return Interrupted(f"{host} was lost while {repo} was {what} ({f'it answered {status}' if status else 'network'})")
