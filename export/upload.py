"""Upload a folder's files to a hub: one commit or nothing, a tag, and what lies there then read back and compared.

Large files go first, to where nobody sees them; one commit then names them all, so a reader sees the last publish or
this one and nothing between, the manifest among it. A run that was cut off is started again: what the hub has is not
sent twice, and what it has whole is not committed twice. Knows no artifact's inside and no hub's own words.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ..recipes.progress import Tell, silent
from . import upload_hf, upload_modelscope
from .remote import Interrupted, Item, Target, There, artifact_differs, check_ours, differences, first_of

LATE = (0, 2, 5)  # seconds before each look at what was sent


@dataclass(frozen=True)
class Door:
    """How to speak with one hub: look at a repository (None where there is none, or it has no such revision), make
    one, send a commit, name a commit; where a browser finds it."""

    check_login: Callable[[], None]
    look: Callable[..., There | None]
    create: Callable[..., None]
    send: Callable[..., list[str]]
    tag: Callable[[str, str, str | None], None]
    url: Callable[[str], str]


DOORS = {
    name: Door(hub.check_login, hub.look, hub.create, hub.send, hub.tag, hub.url)
    for name, hub in (("hf", upload_hf), ("modelscope", upload_modelscope))
}


def check_logins(targets: Iterable[Target]) -> None:
    """OSError where there is no token for a hub of `targets`. Asks nobody."""
    for hub in dict.fromkeys(target.hub for target in targets):
        DOORS[hub].check_login()


@dataclass(frozen=True)
class Plan:
    """What one target lacks: `there` is None where the repository is still to be made; `tagged` says whether the tag
    names this artifact already. Nothing to do where nothing is to be added or dropped and the tag is there."""

    target: Target
    tag: str
    there: There | None
    add: tuple[Item, ...]
    drop: tuple[str, ...]
    tagged: bool

    @property
    def done(self) -> bool:
        return self.there is not None and not self.add and not self.drop and self.tagged


@dataclass(frozen=True)
class Published:
    """A target as it is now: its commit, its page, what this run sent and took away (nothing the second time), and
    what the hub had to say of it."""

    target: Target
    commit: str | None
    tag: str
    url: str
    sent: tuple[str, ...]
    dropped: tuple[str, ...]
    notes: tuple[str, ...] = ()


def look_at(target: Target, items: Sequence[Item], *, tag: str, public: bool, beside: Iterable[str]) -> Plan:
    """What publishing `items` to `target` would do; changes nothing. `beside`: files that are no part of the artifact.

    ValueError where the repository is another model's, is public without `public` (or private with it), or the tag
    names another artifact; OSError where the hub refuses or cannot be reached.
    """
    door = DOORS[target.hub]
    door.check_login()
    there = door.look(target.repo)
    if there is None:
        return Plan(target, tag, None, tuple(items), (), False)
    check_ours(target, there)
    if there.public != public:
        now, way = "private", f"leave --public out, or make it public at {door.url(target.repo)} first"
        if there.public:
            now, way = "public", "say --public if everybody may have this"
        raise ValueError(f"{target} is {now}, and mmq does not change who sees a repository: {way}")
    add, drop = differences(items, there)
    tagged = door.look(target.repo, tag)
    if tagged is not None and (names := artifact_differs(items, tagged, beside=beside)):
        raise ValueError(
            f"{target} has a tag {tag} of another artifact ({first_of(names)}); "
            "a tag never moves: raise the recipe's version, or name another with --tag"
        )
    return Plan(target, tag, there, tuple(add), tuple(drop), tagged is not None)


def upload(
    plan: Plan, items: Sequence[Item], *, public: bool, message: str, license: str | None, tell: Tell = silent
) -> Published:
    """Carry `plan` out, and compare every file with what the hub then tells of it. OSError says what is visible there
    and what to do; it is safe to run again after any of them."""
    target, door = plan.target, DOORS[plan.target.hub]
    there, add, drop = plan.there, plan.add, plan.drop
    notes: list[str] = []
    if there is None:
        door.create(target.repo, public=public, license=license)
        there = door.look(target.repo)
        if there is None:
            raise OSError(f"{target} was made and is not there yet; run again in a minute")
        if there.public and not public:
            raise OSError(f"{target} was made public though it was to be private: set that at {door.url(target.repo)}")
        more, less = differences(items, there)
        add, drop = tuple(more), tuple(less)
    if add or drop:
        try:
            notes += door.send(target.repo, there.commit, add, drop, message=message, tell=tell)
        except Interrupted as e:
            _check_arrived(door, target, items, e)
        there = _read_back(door, target, items)
    if not plan.tagged:
        _tag(door, plan, there, items)
    sent, dropped = tuple(one.path for one in add), tuple(drop)
    return Published(target, there.commit, plan.tag, door.url(target.repo), sent, dropped, tuple(notes))


def _tag(door: Door, plan: Plan, there: There, items: Sequence[Item]) -> None:
    """Name the commit; the tag's files are compared too, for a hub may tag what its branch has become meanwhile."""
    target, repo = plan.target, plan.target.repo
    whole = f"everything is published in {target}, but the tag {plan.tag} is not; run again to set it"
    try:
        door.tag(repo, plan.tag, there.commit)
    except Interrupted as e:
        try:
            arrived = door.look(repo, plan.tag) is not None
        except OSError:
            arrived = False
        if not arrived:
            raise OSError(f"{e}; {whole}") from None
    except OSError as e:
        raise OSError(f"{e}; {whole}") from None
    _read_back(door, target, items, plan.tag)


def _read_back(door: Door, target: Target, items: Sequence[Item], revision: str | None = None) -> There:
    """The repository with every file as it was sent. A hub may tell of a commit some seconds late, so it is asked a few
    times; OSError where it tells of other files then."""
    wrong: list[str] = []
    for wait in LATE:
        time.sleep(wait)
        there = door.look(target.repo, revision)
        wrong = [one.path for one in (differences(items, there)[0] if there else items)]
        if there and not wrong:
            return there
    what = f"the tag {revision} of {target}" if revision else str(target)
    raise OSError(
        f"{what} does not read back as it was sent ({first_of(wrong)}): has someone else changed it "
        f"just now? {'delete the tag there and' if revision else ''} run again"
    )


def _check_arrived(door: Door, target: Target, items: Sequence[Item], why: Interrupted) -> None:
    """A commit whose answer was lost is there, or it is not: OSError then, and where nobody can be asked."""
    try:
        now = door.look(target.repo)
    except OSError:
        raise OSError(f"{why}, and does not tell whether it has the commit; run again: nothing is sent twice") from None
    if now is None or any(differences(items, now)):
        raise OSError(f"{why}; {target} shows nothing of this run: run again, what was uploaded is kept") from None
