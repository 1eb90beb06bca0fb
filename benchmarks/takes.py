"""Prompts for choosing settings: disjoint from each other and from those that results are reported on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from common.checks import check_range
from common.errors import UserError
from training import procedural

HELD_OUT_SEED = 1000
"""First seed of held-out videos: their noise is not that of the others either."""


class Take(NamedTuple):
    """A video to make."""

    prompt: str
    seed: int


@dataclass(frozen=True)
class TakeSets:
    """Videos for each purpose.

    Attributes:
        calibration: to measure how much changes from step to step.
        choosing: to choose settings on.
        held_out: to see whether the choice holds.
    """

    calibration: list[Take]
    choosing: list[Take]
    held_out: list[Take]

    @classmethod
    def load(cls, count: int, held_out: int = 0, file: Path | None = None) -> TakeSets:
        """Sets of prompts from a file, one per line, or without one from the grammar that the tiny models know.

        Args:
            count: prompts to choose on. A file's are also those that changes are measured on.
            held_out: further prompts; a file's come after those to choose on.
            file: UTF-8 text.

        Raises:
            UserError: the file cannot be read or has too few prompts, or a count is out of range.
        """
        check_range("--prompts", count, 1)
        check_range("--held-out", held_out, 0)
        if file is None:
            sets = [procedural.prompts(split, n) for split, n in (("calibration", count), ("choosing", count))]
            return cls(*map(_numbered, sets), _numbered(procedural.prompts("heldout", held_out), HELD_OUT_SEED))
        try:
            lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"prompts file {str(file)!r} cannot be read; give a text file, a prompt per line"
            ) from error
        if len(lines) < count + held_out:
            raise UserError(
                f"prompts file {str(file)!r} has {len(lines)} prompts, and {count + held_out} are asked for; "
                "add some, or lower --prompts"
            )
        choosing = _numbered(lines[:count])
        return cls(choosing, choosing, _numbered(lines[count : count + held_out], HELD_OUT_SEED))


def _numbered(prompts: list[str], first_seed: int = 0) -> list[Take]:
    return [Take(prompt, first_seed + i) for i, prompt in enumerate(prompts)]
