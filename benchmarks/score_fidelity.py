"""How well a token's score foretells the change of its residual, on exact runs (after the paper's Figure 3).

    python -m benchmarks.score_fidelity --config configs/skyreels_v2_tiny_slow.yaml

At every step of every chunk the tokens are ranked by each score, as known before the step, and by the relative change
that their residual then really made. Writes Spearman correlation and NDCG per score, averaged over steps, chunks,
branches and prompts, the same per third of the steps, and how unevenly the change is spread over tokens.
"""

from __future__ import annotations

import argparse
import logging
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

from benchmarks.quality import Sampler
from common.cache import MotionCacheConfig
from common.cache.motion import motion_map
from common.cache.policy import ChunkState, ChunkStep, ExactPolicy, Signals
from common.files import write_json
from common.results import provenance
from skyreels_v2_motioncache.settings import load_settings
from training.procedural import prompts

logger = logging.getLogger("score_fidelity")
ROOT = Path(__file__).resolve().parents[1]
PARTS = ("early", "middle", "late")


def token_change(new: Tensor, old: Tensor) -> Tensor:
    """Relative L1 change per token, `[batch, tokens, channels]` twice to `[tokens]`."""
    return (new - old).abs().mean(dim=(0, 2)) / (old.abs().mean(dim=(0, 2)) + 1e-8)


def ndcg(score: np.ndarray, truth: np.ndarray) -> float:
    """Normalised discounted cumulative gain of ranking `truth` by `score`, all ranks."""
    discount = 1 / np.log2(np.arange(2, len(truth) + 2))
    return float((truth[np.argsort(-score)] * discount).sum() / (np.sort(truth)[::-1] * discount).sum())


class FidelityRecorder(ExactPolicy):
    """Computes everything and compares, at each step, what the scores said with what happened."""

    def __init__(self) -> None:
        self.random = np.random.default_rng(0)
        self.found: dict[tuple[str, str, str], list[float]] = defaultdict(list)
        self.start_video()

    def start_video(self) -> None:
        """Forget the last video's tensors; the findings stay."""
        self.last: dict[tuple, dict[str, Tensor]] = {}

    def observe(
        self, step: ChunkStep, state: ChunkState, neighbour: ChunkState | None, signals: Signals, outputs: Tensor
    ) -> None:
        """Score the tokens by what the previous step left, and remember this one."""
        key = (step.window, step.chunk, step.branch)
        residual, now = outputs - signals.inputs, {"inputs": signals.inputs, "outputs": outputs}
        before = self.last.get(key)
        if before is not None:
            now["change"] = token_change(residual, before["residual"])
            left = self.last.get((step.window, step.chunk - 1, step.branch))
            frame = left["outputs"][:, -step.grid[1] * step.grid[2] :] if left else None
            scores = {
                "output motion (published)": motion_map(before["outputs"], step.grid, frame, relative=True).flatten(),
                "latent motion": motion_map(before["latents"], step.grid, None, relative=False).flatten(),
                "input change": token_change(signals.inputs, before["inputs"]),
                "random": torch.from_numpy(self.random.random(step.tokens)),
            }
            if "change" in before:
                scores["last residual change"] = before["change"]
            self._compare(step, scores, now["change"])
        self.last[key] = {**now, "residual": residual, "latents": signals.latents}

    def _compare(self, step: ChunkStep, scores: dict[str, Tensor], change: Tensor) -> None:
        truth = change.numpy().astype(float)
        part = PARTS[min(3 * step.step // step.num_steps, 2)]
        for name, score in scores.items():
            values = score.numpy().astype(float)
            self.found[name, "spearman", part].append(float(spearmanr(values, truth).statistic))
            self.found[name, "ndcg", part].append(ndcg(values, truth))
        squares = np.sort(truth**2)[::-1]
        top = squares[: len(squares) // 10].sum() / squares.sum()
        self.found["top tenth of tokens", "share of squared change", part].append(float(top))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", type=Path, default=ROOT / "configs/skyreels_v2_tiny_slow.yaml")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--output", type=Path, default=ROOT / "results/score-fidelity-skyreels-tiny.json")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    settings, _ = load_settings(args.config)
    sampler, recorder = Sampler(settings), FidelityRecorder()
    # The recorder decides; the config only makes the adapter hand over the latents.
    config = MotionCacheConfig(distance="input", score="latent_motion")
    for index, prompt in enumerate(prompts("reporting", args.prompts)):
        sampler.sample(prompt, index, config, recorder, decode=False)
        logger.info("prompt %d of %d", index + 1, args.prompts)
    rows: dict[tuple[str, str], dict] = {}
    for (name, measure, part), values in recorder.found.items():
        row = rows.setdefault((name, measure), {"score": name, "measure": measure})
        row[part] = round(float(np.nanmean(values)), 4)
    for row in rows.values():
        row["all"] = round(float(np.mean([row[part] for part in PARTS])), 4)
    command = f"python -m benchmarks.score_fidelity --config configs/{args.config.name} --prompts {args.prompts}"
    write_json(args.output, {**provenance(command), "rows": list(rows.values())})


if __name__ == "__main__":
    main()
