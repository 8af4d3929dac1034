"""The known checkpoints, by what follows from their manifests."""

from __future__ import annotations

from weightkit import manifests


def alike() -> list[list[str]]:
    """Every manifest's name, with those of all whose architecture and totals are the same: V3 and R1, say."""
    groups: list[list[str]] = []
    for name in manifests.names():
        it = manifests.load(name)
        for group in groups:
            other = manifests.load(group[0])
            if (it.config, it.expected) == (other.config, other.expected):
                group.append(name)
                break
        else:
            groups.append([name])
    return groups
