"""Cache settings for MAGI-1 4.5B-distill, by name: the papers' and our own. `configs/magi1_*.yaml` hold whole runs."""

from __future__ import annotations

from typing import Any

from common.cache import MotionCacheConfig
from common.cache.config import BEST
from common.checks import near_miss
from common.errors import UserError

# MAGI-1 has no time modulation: the change of the embedded input is measured, and nothing is fitted to it.
_MOTIONCACHE: dict[str, Any] = {
    "distance": "input",
    "warmup_steps": 5,
    "alpha": 0.6,
    "chunk_phase": 20,
    "chunk_phase_unit": "steps",
    "min_update_share": 0.0,
    "temporal_vote": False,
    "score": "latent_motion",
    "reuse": "velocity",
}
_FLOWCACHE = {**_MOTIONCACHE, "alpha": 1.0}
_TEACACHE = {**_MOTIONCACHE, "method": "teacache"}
PRESETS: dict[str, dict[str, Any]] = {
    "exact": {"method": "exact"},
    "slow": {**_MOTIONCACHE, "threshold": 0.0065},
    "fast": {**_MOTIONCACHE, "threshold": 0.01},
    "flowcache-slow": {**_FLOWCACHE, "threshold": 0.01},
    "flowcache-fast": {**_FLOWCACHE, "threshold": 0.015},
    "teacache-slow": {**_TEACACHE, "threshold": 0.01},
    "teacache-fast": {**_TEACACHE, "threshold": 0.015},
    "best": {"distance": "input", "warmup_steps": 5, "reuse": "velocity", **BEST, "threshold": 0.01},
}


def cache_preset(name: str) -> MotionCacheConfig:
    """A named setting for MAGI-1.

    `slow` is MotionCache as in its public code, but reuses velocities (`reuse: update` is the public form); the
    threshold of `fast` is not published, this one is in the ratio of FlowCache's pair. FlowCache and TeaCache have the
    thresholds of FlowCache's public code, 0.01 for benchmarks and 0.015 for single runs. `best` is ours, with the first
    of them (docs/research.md).

    Raises:
        UserError: no preset has that name.
    """
    if name not in PRESETS:
        raise UserError(f"unknown preset {name!r}; {near_miss(name, PRESETS)}")
    return MotionCacheConfig(**PRESETS[name])
