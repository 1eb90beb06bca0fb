"""A folder of samples, checked to be whole: what was made, its scores, and the prompts that all methods have."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.samples import SampleFolder, open_samples
from common.compare import EXACT
from common.errors import UserError

EXPERIMENT = "experiment.json"
VBENCH = "vbench.json"
Facts = dict[str, Any]


@dataclass(frozen=True)
class Collection:
    """What `benchmarks.sample` and `benchmarks.score` left in a folder.

    Attributes:
        folder: where it is.
        command: that made the samples.
        changes: settings of the experiment that differ from its config, by name.
        samples: per method, then per stem of the files' names, the sample's summary.
        scores: the same of its scores; the exact video, with which others are compared, has none.
        vbench: per method, score per dimension and in `total`; empty without VBench.
        stems: prompts and seeds that every method has: what is compared is compared on these.
    """

    folder: SampleFolder
    command: str
    changes: dict[str, Any]
    samples: dict[str, dict[str, Facts]]
    scores: dict[str, dict[str, Facts]]
    vbench: dict[str, dict[str, float]]
    stems: list[str]

    def first(self, method: str) -> Facts:
        """Summary of a method's first sample: what is the same for all of them."""
        return self.samples[method][self.stems[0]]


def collect(root: Path, partial: bool = False) -> Collection:
    """Read a folder of samples.

    Args:
        root: folder of one experiment.
        partial: whether to go on with the prompts that all methods have when some are missing.

    Raises:
        UserError: samples are missing, or have no scores, or those of other videos; the line says how to go on.
    """
    folder = open_samples(root)
    asked = _json(root / EXPERIMENT)
    samples = {
        method: {stem: facts for stem in asked["stems"] if (facts := folder.summary(method, stem)) is not None}
        for method in asked["methods"]
    }
    missing = [f"{method}/{stem}" for method, of in samples.items() for stem in asked["stems"] if stem not in of]
    if missing and not partial:
        raise UserError(
            f"{str(root)!r} is not finished: {len(missing)} of {len(samples) * len(asked['stems'])} samples are "
            f"missing, such as {missing[0]!r}; go on with: {asked['command']}, or give --partial to compare the "
            "prompts that all methods have"
        )
    stems = [stem for stem in asked["stems"] if all(stem in of for of in samples.values())]
    if not stems:
        raise UserError(f"{str(root)!r} has no prompt that all of its methods have; go on with: {asked['command']}")
    vbench = _json(root / VBENCH) if (root / VBENCH).is_file() else {}
    changes = asked.get("settings", {})
    return Collection(folder, asked["command"], changes, samples, _scores(folder, samples, stems), vbench, stems)


def _scores(
    folder: SampleFolder, samples: dict[str, dict[str, Facts]], stems: list[str]
) -> dict[str, dict[str, Facts]]:
    scores: dict[str, dict[str, Facts]] = {}
    stale = []
    for method in [name for name in samples if name != EXACT]:
        for stem in stems:
            found = folder.scores(method, stem) or {}
            expected = (samples[method][stem]["fingerprint"], samples[EXACT][stem]["fingerprint"])
            if (found.get("fingerprint"), found.get("reference")) == expected:
                scores.setdefault(method, {})[stem] = found
            else:
                stale.append(f"{method}/{stem}")
    if stale:
        raise UserError(
            f"{len(stale)} videos in {str(folder.root)!r} have no scores or those of older videos, such as "
            f"{stale[0]!r}; score them with: python -m benchmarks.score {folder.root}"
        )
    return scores


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{str(path)!r} cannot be read ({error}); run the sampling command again") from error
