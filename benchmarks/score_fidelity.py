"""How well a token's score foretells the change of its residual, on exact runs (the paper's Figures 2 and 3).

    python -m benchmarks.score_fidelity --config configs/skyreels_v2_tiny_slow.yaml \\
        --output results/score-fidelity-skyreels-tiny.json

At every step of every chunk the tokens are ranked by each score, as known before the step, and by the relative change
that their residual then really made. Writes Spearman correlation and NDCG per score, by step and by third of the steps,
averaged over chunks, guidance passes and prompts; how unevenly the change is spread over tokens; and change and motion
of each frame.
"""

from __future__ import annotations

import logging
import shlex
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

from benchmarks.subject import family_of, load_subject
from common.cache import MotionCacheConfig
from common.cache.motion import motion_map
from common.cache.policy import ChunkState, ChunkStep, ExactPolicy, Signals
from common.cli import Parser, count, run_command
from common.files import make_output_folder, write_json
from common.results import provenance
from training.procedural import prompts

logger = logging.getLogger("score_fidelity")
ROOT = Path(__file__).resolve().parents[1]
PARTS = ("early", "middle", "late")
PUBLISHED = {"SkyReels-V2": "output motion", "MAGI-1": "latent motion"}
"""What the public code weighs tokens by."""
MEASURES = ("spearman", "ndcg")
TOP = tuple(k / 20 for k in range(1, 21))
"""Shares of the tokens, those that change most first, whose part of the whole change is written."""


def token_change(new: Tensor, old: Tensor) -> Tensor:
    """Relative L1 change per token, `[batch, tokens, channels]` twice to `[tokens]`."""
    return (new - old).abs().mean(dim=(0, 2)) / (old.abs().mean(dim=(0, 2)) + 1e-8)


def ndcg(score: np.ndarray, truth: np.ndarray) -> float:
    """Normalised discounted cumulative gain of ranking `truth` by `score`, all ranks."""
    discount = 1 / np.log2(np.arange(2, len(truth) + 2))
    return float((truth[np.argsort(-score)] * discount).sum() / (np.sort(truth)[::-1] * discount).sum())


def concentration(truth: np.ndarray) -> list[float]:
    """Part of the squared change that lies in the most changing tokens, for each share in `TOP`."""
    squares = np.cumsum(np.sort(truth**2)[::-1])
    return [float(squares[max(round(share * len(truth)), 1) - 1] / squares[-1]) for share in TOP]


class FidelityRecorder(ExactPolicy):
    """Computes everything and compares, at each step, what the scores said with what happened.

    Args:
        published: the score whose mean over each frame is noted beside the frame's change.

    Attributes:
        found: values by score, measure and step.
        spread: `concentration` by step.
        frames: change and published score by latent frame of the window.
    """

    def __init__(self, published: str) -> None:
        self.published = published
        self.random = np.random.default_rng(0)
        self.num_steps = 0
        self.found: dict[tuple[str, str, int], list[float]] = defaultdict(list)
        self.spread: dict[int, list[list[float]]] = defaultdict(list)
        self.frames: dict[tuple[str, int], list[float]] = defaultdict(list)
        self.start_video()

    def start_video(self) -> None:
        """Forget the last video's tensors; the findings stay."""
        self.last: dict[tuple, dict[str, Tensor]] = {}

    def observe(
        self, step: ChunkStep, state: ChunkState, neighbour: ChunkState | None, signals: Signals, outputs: Tensor
    ) -> None:
        """Score the tokens by what the previous step left, and remember this one."""
        self.num_steps = step.num_steps
        key = (step.window, step.chunk, step.branch)
        residual, now = outputs - signals.inputs, {"inputs": signals.inputs, "outputs": outputs}
        before = self.last.get(key)
        if before is not None:
            now["change"] = token_change(residual, before["residual"])
            left = self.last.get((step.window, step.chunk - 1, step.branch))
            scores = {
                "output motion": self._motion("outputs", before, left, step, relative=True),
                "latent motion": self._motion("latents", before, left, step, relative=False),
                "input change": token_change(signals.inputs, before["inputs"]),
                "random": torch.from_numpy(self.random.random(step.tokens)),
            }
            if "change" in before:
                scores["last residual change"] = before["change"]
            self._compare(step, scores, now["change"])
        self.last[key] = {**now, "residual": residual, "latents": signals.latents}

    def _motion(
        self, of: str, before: dict[str, Tensor], left: dict[str, Tensor] | None, step: ChunkStep, relative: bool
    ) -> Tensor:
        frame = left[of][:, -step.grid[1] * step.grid[2] :] if left else None
        return motion_map(before[of], step.grid, frame, relative).flatten()

    def _compare(self, step: ChunkStep, scores: dict[str, Tensor], change: Tensor) -> None:
        truth = change.cpu().numpy().astype(float)
        for name, score in scores.items():
            values = score.cpu().numpy().astype(float)
            if values.min() < values.max():  # equal scores rank nothing
                self.found[name, "spearman", step.step].append(float(spearmanr(values, truth).statistic))
            self.found[name, "ndcg", step.step].append(ndcg(values, truth))
        self.spread[step.step].append(concentration(truth))
        per_frame = {"change": change, "motion": scores[self.published]}
        for name, values in per_frame.items():
            for frame, mean in enumerate(values.view(step.grid[0], -1).mean(dim=1).tolist()):
                self.frames[name, step.chunk * step.grid[0] + frame].append(mean)

    def summary(self) -> dict[str, Any]:
        """Everything found, as in the result file: `rows` by third of the steps, `steps`, `tokens` and `frames`."""
        scores = list(dict.fromkeys(name for name, _, _ in self.found))
        steps = {
            name: {m: [self._mean(name, m, k) for k in range(self.num_steps)] for m in MEASURES} for name in scores
        }
        rows = [{"score": name, "measure": m, **self._by_part(steps[name][m])} for name in scores for m in MEASURES]
        spread = [np.mean(self.spread[k], axis=0) if k in self.spread else None for k in range(self.num_steps)]
        tokens = {
            part: _rounded(np.mean([spread[k] for k in self._steps_of(part) if spread[k] is not None], axis=0))
            for part in PARTS
        }
        count = 1 + max(frame for _, frame in self.frames)
        frames = {n: _rounded([np.mean(self.frames[n, f]) for f in range(count)]) for n in ("change", "motion")}
        return {"rows": rows, "steps": steps, "tokens": {"top": list(TOP), **tokens}, "frames": frames}

    def _mean(self, name: str, measure: str, step: int) -> float | None:
        return _mean_of(self.found.get((name, measure, step), []))

    def _by_part(self, by_step: list[float | None]) -> dict[str, float | None]:
        means = {part: _mean_of(by_step[k] for k in self._steps_of(part)) for part in PARTS}
        return {**means, "all": _mean_of(means.values())}

    def _steps_of(self, part: str) -> list[int]:
        return [k for k in range(self.num_steps) if PARTS[3 * k // self.num_steps] == part]


def _mean_of(values: Iterable[float | None]) -> float | None:
    """Mean of the values that there are; None without any."""
    known = [value for value in values if value is not None]
    return round(float(np.mean(known)), 4) if known else None


def _rounded(values: Iterable[float]) -> list[float]:
    return [round(float(value), 5) for value in values]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return run_command(lambda: _run(arguments))


def _run(arguments: list[str]) -> None:
    parser = Parser.of_module("benchmarks.score_fidelity", __doc__)
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="YAML file of either model")
    parser.add_argument("--prompts", type=count, default=8, metavar="N", help="prompts of the reporting set (8)")
    parser.add_argument("--output", type=Path, required=True, metavar="NAME.json", help="file to write")
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    make_output_folder(args.output.parent)
    published = PUBLISHED[family_of(args.config)]
    subject, recorder = load_subject(args.config), FidelityRecorder(published)
    # The recorder decides; the config only makes the adapter hand over the latents.
    config = MotionCacheConfig(distance="input", score="latent_motion")
    for index, prompt in enumerate(prompts("reporting", args.prompts)):
        recorder.start_video()
        subject.sample(prompt, index, config, recorder, decode=False)
        logger.info("prompt %d of %d", index + 1, args.prompts)
    command = shlex.join(["python", "-m", "benchmarks.score_fidelity", *arguments])
    facts = {"model": subject.folder.name, "published": published, "prompts": args.prompts}
    write_json(args.output, {**provenance(command), **facts, **recorder.summary()})


if __name__ == "__main__":
    sys.exit(main())
