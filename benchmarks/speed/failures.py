"""What is told of an error that stops one measurement and not the others."""

from __future__ import annotations

LONGEST = 300


def first_line(error: BaseException) -> str:
    """Kind and first line of an error; a line that only announces the next one, as compilers give, takes it along."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = " ".join(lines[:2]) if lines and lines[0].endswith(":") else "".join(lines[:1])
    return f"{type(error).__name__}: {told}"[:LONGEST].removesuffix(": ")
