"""What the papers report, to stand beside our own figures and never among them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.files import parse_yaml

FILE = Path(__file__).with_name("quoted.yaml")


@dataclass(frozen=True)
class Quoted:
    """One table of a paper, as far as it concerns one model.

    Attributes:
        family: the model, as in `benchmarks.subject.FAMILIES`.
        paper: where it is from.
        setting: model, size and device.
        rows: `method` and those of `pflops`, `speedup` (against the paper's vanilla), `latency_s` (seconds), `vbench`,
            `psnr_db`, `ssim`, `lpips` that the paper gives.
    """

    family: str
    paper: str
    setting: str
    rows: list[dict[str, Any]]


def load_quoted(family: str) -> list[Quoted]:
    """All quoted tables of a model."""
    tables = [Quoted(**entry) for entry in parse_yaml(FILE.read_text(encoding="utf-8"))]
    return [table for table in tables if table.family == family]
