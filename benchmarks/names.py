"""What the name of a method says: `motioncache-slow`, `flowcache-matched@0.4`."""

from __future__ import annotations

import re

BASELINE = "flowcache-matched"
"""Kind that others are compared with at the same share of compute."""
ORDER = ("stock", "exact", "teacache", "flowcache", "motioncache", "best")
PRESETS = ("slow", "fast")


def split_name(method: str) -> tuple[str, float | None]:
    """Kind and share of compute: `("flowcache-matched", 0.4)` of `flowcache-matched@0.4`; no share without an `@`."""
    kind, at, share = method.partition("@")
    return (kind, float(share)) if at else (method, None)


def preset_of(method: str) -> str | None:
    """The preset that a method's name ends in: `slow` of `motioncache-slow`, `best` of `best`."""
    last = method.rpartition("-")[2]
    return last if last in PRESETS or method in ("exact", "best") else None


def reading_order(method: str) -> tuple:
    """Sort key: the references, presets method by method, then the methods side by side at each share of compute."""
    kind, share = split_name(method)
    family, preset = kind.partition("-")[0], preset_of(kind)
    numbers = [float(part) if index % 2 else part for index, part in enumerate(re.split(r"(\d+(?:\.\d+)?)", kind))]
    return (
        share is not None,
        -(share or 0.0),
        ORDER.index(family) if family in ORDER else len(ORDER),
        PRESETS.index(preset) if preset in PRESETS else -1,
        numbers,
    )
