"""One run of a command: where it writes, what it was run with, and what each of its stages took."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "numpy")
_WRITTEN_BY_RUNS = (":(exclude)results", ":(exclude)docs")


@dataclass
class Stage:
    """One way of making the video, and what it took.

    Attributes:
        name: `"stock"`, `"exact"` or the cached method's name.
        seconds: denoising time; text encoding and decoding of latents are left out, as caching does not touch them.
        flops: matrix products computed, a multiply-add counting 2.
        tokens_computed: tokens that went through the block stack, summed over iterations and branches.
        measured_iterations: None when the whole stage was run; otherwise the number of iterations that `seconds` was
            scaled up from.
        psnr_db, ssim: against the exact video; None where there is none, or it is the exact video itself.
    """

    name: str
    seconds: float
    flops: float
    tokens_computed: int
    measured_iterations: int | None = None
    psnr_db: float | None = None
    ssim: float | None = None


def default_output(model: str, method: str, root: Path = Path("outputs")) -> Path:
    """`outputs/<time>-<model>-<method>`, with a number added if a run of the same second has the name."""
    name = "-".join([time.strftime("%Y%m%d-%H%M%S"), _slug(Path(model).name), _slug(method)])
    folder, number = root / name, 2
    while folder.exists():
        folder, number = root / f"{name}-{number}", number + 1
    return folder


def versions() -> dict[str, str | None]:
    """Versions of the packages that results depend on; None for one that is not installed."""
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def git_commit(folder: Path = REPOSITORY) -> str | None:
    """Commit of the code, with `-dirty` added when files differ from it; None outside a repository.

    Results and documents may differ: no run depends on them, and one that has just ended writes them.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        changes = git("status", "--porcelain", "--untracked-files=no", "--", ".", *_WRITTEN_BY_RUNS)
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("-dirty" if changes else "")


def find_stage(stages: list[Stage], name: str) -> Stage | None:
    """The stage of that name, if it was run."""
    return next((stage for stage in stages if stage.name == name), None)


def speedup(stage: Stage, reference: Stage | None) -> float | None:
    """How many times faster than the reference; None without one."""
    return reference.seconds / stage.seconds if reference is not None and stage.seconds > 0 else None


def summary(stages: list[Stage], tokens_total: int, facts: dict[str, Any]) -> dict[str, Any]:
    """What `summary.json` holds: `facts` of the run, and figures of the last stage against the others.

    Args:
        stages: in the order they ran; the last one is the method that the run is about.
        tokens_total: token computations of exact execution.
        facts: model, method, config, seed and whatever else identifies the run.
    """
    method = stages[-1]
    return {
        **facts,
        "wall_seconds": method.seconds,
        "flops": method.flops,
        "tokens_computed": method.tokens_computed,
        "tokens_total": tokens_total,
        "speedup_vs_stock": speedup(method, find_stage(stages, "stock")),
        "speedup_vs_exact": speedup(method, find_stage(stages, "exact")),
        "psnr_db": method.psnr_db,
        "ssim": method.ssim,
        "stages": [dataclasses.asdict(stage) for stage in stages],
        "versions": versions(),
        "commit": git_commit(),
    }


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-").lower()
