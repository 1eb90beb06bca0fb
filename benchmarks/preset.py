"""What a calibration leaves behind: a YAML preset, the measured curve, and a picture of it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from benchmarks.plots import error_bars, new_figure, save, styled
from benchmarks.search import NEVER, REACH, Point, Target
from benchmarks.thresholds import Trial
from benchmarks.yaml_text import set_values
from common.cache import MotionCacheConfig
from common.files import atomic_path, read_yaml, write_json

HEAD = "# Calibrated to "
SHARE = "FLOPs / exact's"


@dataclass(frozen=True)
class Calibration:
    """What was found.

    Attributes:
        target: what was to be reached.
        best: the trial that was chosen.
        trials: all of them.
        held_out: the choice with prompts that nothing was chosen on; None without any.
    """

    target: Target
    best: Trial
    trials: list[Trial]
    held_out: Point | None

    @property
    def miss(self) -> float:
        """Relative distance from the target, on held-out prompts if there are any."""
        return self.target.miss(self.held_out or self.best.point)

    @property
    def reached(self) -> bool:
        """Whether that is near enough."""
        return self.miss <= REACH

    @property
    def advice(self) -> str:
        """What to do when it is not."""
        if self.target.miss(self.best.point) > REACH:
            return "the curve jumps over it, as whole chunks decide; choose another target, or --method motioncache"
        return "these prompts differ more than those it was chosen on; raise --prompts"


def write_calibration(
    output: Path, base: Path, options: Mapping[str, Any], found: Calibration, facts: Mapping[str, Any]
) -> None:
    """Write `output` (YAML) and the curve beside it (`.json`, `.png`).

    Args:
        output: the preset.
        base: config that it is a copy of.
        options: settings that were changed on top of it, by dotted names.
        found: what was found.
        facts: for the JSON file, `command` among them.
    """
    write_json(output.with_suffix(".json"), {**facts, **summary(found)})
    save(draw(found), output.with_suffix(".png"))
    with atomic_path(output) as preset:
        preset.write_text(preset_text(base, options, found, facts["command"]), encoding="utf-8")


def preset_text(base: Path, options: Mapping[str, Any], found: Calibration, command: str) -> str:
    """The base config's text with changed values, and at its head what was measured."""
    cache = found.best.cache.to_dict()
    before = MotionCacheConfig.from_dict(read_yaml(base).get("cache") or {}).to_dict()
    values = {tuple(key.split(".")): value for key, value in options.items()}
    values |= {("cache", key): value for key, value in cache.items() if value != before[key]}
    values["cache", "threshold"] = found.best.point.threshold
    comments = {("cache", "threshold"): f"{found.best.point}"}
    text = set_values(base.read_text(encoding="utf-8"), values, comments)
    text = re.sub(rf"\A{HEAD}.*\n(?:#   .*\n)*", "", text)  # of the calibration that made the base
    lines = [f"{HEAD}{found.target}: {found.best.point}, mean over {found.best.point.prompts} prompts."]
    if found.held_out is not None:
        lines.append(f"#   With {found.held_out.prompts} held-out prompts: {found.held_out}.")
    return "\n".join([*lines, f"#   {command}", text])


def summary(found: Calibration) -> dict[str, Any]:
    """Everything that was measured, in plain types."""
    return {
        "target": str(found.target),
        "reached": found.reached,
        "result": dataclasses.asdict(found.best.point),
        "held_out": None if found.held_out is None else dataclasses.asdict(found.held_out),
        "cache": found.best.cache.to_dict(),
        "curves": [
            {
                "cache": trial.cache.to_dict(),
                "at_target": trial.merit,
                "points": [dataclasses.asdict(point) for point in trial.curve.points],
            }
            for trial in found.trials
        ],
    }


@styled()
def draw(found: Calibration) -> Figure:
    """Share of the chosen curve over its threshold, and PSNR over the share, readable in black and white."""
    figure, (left, right) = new_figure(2)
    point, points = found.best.point, found.best.curve.points
    curve, chosen = {"color": "black", "marker": "o"}, {"color": "black", "marker": "s", "fillstyle": "none"}
    error_bars(left, [(p.threshold, p.share, None) for p in points if p.threshold != NEVER], "measured", curve)
    left.axhline(points[-1].share, color="0.6", linestyle=":", label="all reused after warm-up")
    left.set(xscale="log", xlabel="threshold τ", ylabel=SHARE)
    left.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    left.xaxis.set_major_formatter("{x:g}")
    left.xaxis.set_minor_formatter(NullFormatter())
    error_bars(right, [(p.share, p.psnr_db, p.psnr_ci95) for p in points], "measured", curve)
    if found.held_out is not None:
        held_out = (found.held_out.share, found.held_out.psnr_db, found.held_out.psnr_ci95)
        error_bars(right, [held_out], "held-out prompts", {"color": "0.5", "marker": "^"})
    right.set(xlabel=SHARE, ylabel="PSNR against exact, dB")
    for axes, at in ((left, (point.threshold, point.share)), (right, (point.share, point.psnr_db))):
        axes.plot(*at, **chosen, markersize=9, linestyle="none", label=f"chosen for {found.target}")
        axes.legend(frameon=False)
    figure.suptitle(found.best.cache.tag)
    return figure
