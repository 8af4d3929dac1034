"""Asking the hubs: both at once, none waited for longer than need be; and what was pinned earlier."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from weightkit.errors import HubError, TargetError, UnreachableError, WeightkitError, raise_all
from weightkit.hub.clients import OFFLINE, Hub, connect
from weightkit.hub.listing import HubName, Listing
from weightkit.hub.state import State
from weightkit.hub.transport import Source
from weightkit.hub.wanted import Wanted
from weightkit.remote.patience import Hiccup, Patience, Stopped

#: The second hub is waited for so long after the first has answered.
GRACE_S = 5.0
#: And all of them no longer than this, waits that they ask for included.
LONGEST_S = 300.0


@dataclass
class Answers:
    """Pinned listings with their sources, the first of which counts, and what is to be told."""

    listings: list[Listing] = field(default_factory=list)
    sources: list[Source] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[WeightkitError] = field(default_factory=list)


def ask_all(
    wanted: Wanted,
    names: Sequence[HubName],
    state: State,
    *,
    revision: str | None,
    token: str | None,
    patience: Patience,
    stop: threading.Event,
) -> Answers:
    """Listings of the hubs: at the pinned commit, or, where nothing is pinned yet, at what ``revision`` is now.

    Raises:
        HubError: no hub answers, and nothing is pinned.
        TargetError: something else is pinned.
    """
    hubs = {name: connect(name, wanted.places[name][0], token) for name in names}
    pinned = {listing.hub: listing for listing in state.listings}
    questions: dict[HubName, Callable[[], Listing]] = {}
    for name, hub in hubs.items():
        asked = revision or (pinned[name].revision if name in pinned else wanted.places[name][1])
        questions[name] = _question(hub, asked, pinned.get(name), patience, stop)
    found = _ask(questions, stop)
    answers = Answers()
    for name in names:
        _take(answers, hubs[name], found.get(name), pinned.get(name), revision)
    if state.listings:
        return _continue(answers, state)
    if not answers.listings:
        raise_all("no hub has it", answers.problems, where=wanted.name)
    answers.notes += [f"{problem.where}: {problem.what}" for problem in answers.problems]
    return answers


def _question(
    hub: Hub, revision: str, pinned: Listing | None, patience: Patience, stop: threading.Event
) -> Callable[[], Listing]:
    """What to ask a hub: the listing, or, where it is pinned, only whether the branch moved."""

    def ask() -> Listing:
        if pinned is not None:
            commit = hub.commit(revision)
            if commit is not None:
                return replace(pinned, revision=revision, commit=commit)
        return hub.listing(revision)

    return lambda: patience.ask(ask, stop)


def _ask(
    questions: dict[HubName, Callable[[], Listing]], stop: threading.Event
) -> dict[HubName, Listing | WeightkitError]:
    """All answers that come in time. Threads, since the clients set no time limit of their own everywhere."""
    found: dict[HubName, Listing | WeightkitError] = {}
    changed = threading.Condition()

    def run(name: HubName) -> None:
        result: Listing | WeightkitError | None = None
        try:
            result = questions[name]()
        except Hiccup as hiccup:
            result = UnreachableError(f"does not answer ({hiccup.reason})", where=name, fix=OFFLINE)
        except Stopped:
            pass
        except WeightkitError as error:
            result = error
        except Exception as error:
            result = HubError(f"its client failed ({type(error).__name__}: {error})", where=name)
        with changed:
            if result is not None:
                found[name] = result
            changed.notify()

    for name in questions:
        threading.Thread(target=run, args=(name,), daemon=True, name=f"ask-{name}").start()
    deadline, answered = time.monotonic() + LONGEST_S, False
    with changed:
        while len(found) < len(questions) and time.monotonic() < deadline:
            changed.wait(0.2)
            if not answered and any(isinstance(answer, Listing) for answer in found.values()):
                deadline, answered = time.monotonic() + GRACE_S, True
        return dict(found)


def _take(
    answers: Answers, hub: Hub, found: Listing | WeightkitError | None, pinned: Listing | None, revision: str | None
) -> None:
    """One hub's answer."""
    if isinstance(found, WeightkitError):
        answers.problems.append(found)
    elif found is None:
        answers.problems.append(UnreachableError("does not answer in time", where=hub.name, fix=OFFLINE))
    if pinned is not None:
        now = found.commit if isinstance(found, Listing) else None
        if revision not in (None, pinned.revision, pinned.commit) and now != pinned.commit:
            raise TargetError(
                "the target holds another revision",
                where=f"{hub.name}: {pinned.repo}",
                expected=f"{pinned.revision}, commit {pinned.commit}",
                found=f"{revision}, {'of a commit that is not known' if now is None else f'commit {now}'}",
                fix="Name another target.",
            )
        if isinstance(found, Listing) and now != pinned.commit:
            answers.notes.append(
                f"{hub.name}: {found.revision} has moved from {pinned.commit[:20]} to {found.commit[:20]}; "
                "the target keeps the former"
            )
        if not isinstance(found, HubError) or isinstance(found, UnreachableError):
            answers.listings.append(pinned)
            answers.sources.append(Source(hub, pinned.commit, pinned.revision))
    elif isinstance(found, Listing):
        answers.listings.append(found)
        answers.sources.append(Source(hub, found.commit, found.revision))


def _continue(answers: Answers, state: State) -> Answers:
    """The pinned listing stays the one that counts, whichever hubs are asked now."""
    first = state.listings[0]
    others = [listing for listing in answers.listings if listing.hub != first.hub]
    others += [held for held in state.listings[1:] if held.hub not in {listing.hub for listing in others}]
    answers.listings = [first, *others]
    answers.notes += [f"{problem.where}: {problem.what}" for problem in answers.problems]
    return answers
