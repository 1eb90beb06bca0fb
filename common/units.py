"""Numbers for people."""

from __future__ import annotations


def scaled(count: float) -> str:
    """A count with the largest prefix that leaves a number of at least 1: `113.4 P`."""
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {prefix}"
    return f"{count:.0f}"
