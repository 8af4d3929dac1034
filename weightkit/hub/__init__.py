"""Checkpoints from the hubs, right in every fault, and on to the next machine.

listing.py      what a hub says a repository holds, read as untrusted input
clients.py      the two hubs, through their own clients
ask.py          both asked at once; what was pinned earlier
wanted.py       a model's name, its places, which of its files
mtp.py          files of MTP tensors alone, told by their headers
plan.py         what a fetch will do, before anything is written
transport.py    one response: status codes, and whether it is of the listed object
line.py         one file's bytes, over as many responses and hubs as it takes
partial.py      one file on its way, and the map of what has arrived
mend.py         one file whose checksum is wrong
run.py          workers
state.py        what is kept in the target
api.py          all of it in one call
mirror/         a read-only hub for the local network
"""

from __future__ import annotations

from typing import TYPE_CHECKING

#: Public name to the module that defines it: the mirror needs none of them, and they none of the mirror.
_HOMES = {
    "FetchPlan": "weightkit.hub.plan",
    "Fetched": "weightkit.hub.api",
    "Grain": "weightkit.hub.partial",
    "Patience": "weightkit.remote.patience",
    "execute": "weightkit.hub.api",
    "fetch": "weightkit.hub.api",
    "plan_fetch": "weightkit.hub.plan",
}

if TYPE_CHECKING:
    from weightkit.hub.api import Fetched, execute, fetch
    from weightkit.hub.partial import Grain
    from weightkit.hub.plan import FetchPlan, plan_fetch
    from weightkit.remote.patience import Patience

__all__ = ["FetchPlan", "Fetched", "Grain", "Patience", "execute", "fetch", "plan_fetch"]


def __getattr__(name: str) -> object:
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
