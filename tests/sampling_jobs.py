"""Small sampling jobs: random models, two prompts, a few methods."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import yaml

from benchmarks import sample
from common.settings import CONFIGS

SIZES = {
    "skyreels_v2": {"height": 16, "width": 16, "num_frames": 21, "steps": 4, "ar_step": 1},
    "magi1": {"height": 32, "width": 32, "num_frames": 16, "steps": 8},
}
CACHE = {"warmup_steps": 1, "chunk_phase": 1, "distance": "input", "distance_table": None, "threshold": 0.4}
METHODS: dict[str, dict[str, Any]] = {"motioncache": {}, "exact": {}, "stock": {}}


def write_experiment(
    folder: Path, checkpoint: Path, methods: dict[str, Any] = METHODS, family: str = "skyreels_v2", **sizes: int
) -> Path:
    """A config and an experiment file in a folder.

    Args:
        folder: where to.
        checkpoint: of the model.
        methods: of the experiment.
        family: of the model.
        sizes: settings of the config that differ from the smallest.
    """
    folder.mkdir(exist_ok=True)
    settings = yaml.safe_load((CONFIGS / f"{family}_tiny_slow.yaml").read_text())
    settings |= {**SIZES[family], **sizes, "model": str(checkpoint)}
    settings["cache"] |= CACHE
    config = folder / "small_slow.yaml"
    config.write_text(yaml.safe_dump(settings))
    prompts = {"split": "reporting", "count": 2}
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump({"config": str(config), "prompts": prompts, "methods": methods}, sort_keys=False))
    return path


def run_as_rank(rank: int, world: int, port: int, arguments: list[str]) -> None:
    """The command as one of the processes that `accelerate launch --multi_gpu --num_processes N` starts."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    raise SystemExit(sample.main(arguments))


def contents(output: Path) -> dict[str, bytes]:
    """Both videos of every sample by name, as bytes."""
    return {str(f.relative_to(output)): f.read_bytes() for f in output.glob("*/*") if f.suffix in (".mkv", ".mp4")}


def finished(output: Path) -> dict[str, tuple[bytes, int]]:
    """Content and time of all files of samples whose summary is there."""
    files: dict[str, tuple[bytes, int]] = {}
    for summary in output.glob("*/[!.]*.json"):
        if summary.name.endswith((".trace.json", ".scores.json")):
            continue
        for file in summary.parent.glob(summary.name.removesuffix(".json") + ".*"):
            with contextlib.suppress(FileNotFoundError):
                files[str(file.relative_to(output))] = (file.read_bytes(), file.stat().st_mtime_ns)
    return files
