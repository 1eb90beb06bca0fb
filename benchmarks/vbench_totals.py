"""VBench's three totals from its sixteen scores.

Ranges and weights are those that VBench publishes for its leaderboard (`scripts/constant.py` and
`scripts/cal_final_score.py` of its repository): each score is placed between the lowest and the highest that its
authors found, a group's score is the weighted mean of its dimensions', and quality counts four times as much as
agreement with the prompt.
"""

from __future__ import annotations

from typing import NamedTuple

from benchmarks.vbench_prompts import PROMPT_LIST

QUALITY_WEIGHT, SEMANTIC_WEIGHT = 4, 1


class Scale(NamedTuple):
    """How a dimension's score, 0 to 1, counts.

    Attributes:
        low, high: of the range that is mapped to 0..1.
        weight: in its group.
    """

    low: float = 0.0
    high: float = 1.0
    weight: float = 1.0


QUALITY = {
    "subject_consistency": Scale(0.1462),
    "background_consistency": Scale(0.2615),
    "temporal_flickering": Scale(0.6293),
    "motion_smoothness": Scale(0.706, 0.9975),
    "dynamic_degree": Scale(weight=0.5),
    "aesthetic_quality": Scale(),
    "imaging_quality": Scale(),
}
SEMANTIC = {
    "object_class": Scale(),
    "multiple_objects": Scale(),
    "human_action": Scale(),
    "color": Scale(),
    "spatial_relationship": Scale(),
    "scene": Scale(high=0.8222),
    "appearance_style": Scale(0.0009, 0.2855),
    "temporal_style": Scale(high=0.364),
    "overall_consistency": Scale(high=0.364),
}


def with_totals(scores: dict[str, float]) -> dict[str, float | None]:
    """Scores in percent, with `quality`, `semantic` and `total`.

    Args:
        scores: by dimension, as VBench reports them, 0 to 1.

    Returns:
        The same in percent, in VBench's order. A total is None while one of its dimensions is missing: VBench's own
        script counts what is missing as nothing at all, which says nothing about a model.
    """
    percent: dict[str, float | None] = {name: 100 * scores[name] for name in PROMPT_LIST if name in scores}
    quality, semantic = _group(scores, QUALITY), _group(scores, SEMANTIC)
    total = None
    if quality is not None and semantic is not None:
        total = (QUALITY_WEIGHT * quality + SEMANTIC_WEIGHT * semantic) / (QUALITY_WEIGHT + SEMANTIC_WEIGHT)
    return {**percent, "quality": quality, "semantic": semantic, "total": total}


def _group(scores: dict[str, float], scales: dict[str, Scale]) -> float | None:
    if not scales.keys() <= scores.keys():
        return None
    placed = [s.weight * (scores[name] - s.low) / (s.high - s.low) for name, s in scales.items()]
    return 100 * sum(placed) / sum(s.weight for s in scales.values())
