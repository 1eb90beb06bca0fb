"""Quality at matched compute: caching methods against exact execution, over many prompts.

    python -m benchmarks.quality --config configs/skyreels_v2_tiny_slow.yaml --processes 4

Both methods get the same distance, the measured table; the published one, the rescaled time modulation, is compared at
one share. Three disjoint sets of prompts are used. On the first the distances are measured, on the second each method's
threshold is searched for every target share of exact's token computations, on the third the methods are compared.
Finished jobs are kept in a file beside the results, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import logging
import multiprocessing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from common import metrics
from common.cache import MotionCacheConfig
from common.cache.calibration import ChangeRecorder, StepChange, distance_table, fit_polynomial
from common.cache.policy import Policy
from common.errors import UserError
from common.files import write_json
from common.results import provenance
from skyreels_v2_motioncache import apply_motioncache, remove_motioncache
from skyreels_v2_motioncache.checkpoint import find_checkpoint, inspect_checkpoint
from skyreels_v2_motioncache.cost import model_cost
from skyreels_v2_motioncache.generate import Generator
from skyreels_v2_motioncache.loading import load_pipeline
from skyreels_v2_motioncache.settings import RunSettings, load_settings
from skyreels_v2_motioncache.validate import check_shapes
from skyreels_v2_motioncache.windows import latent_frames
from training.procedural import prompts

logger = logging.getLogger("quality")
ROOT = Path(__file__).resolve().parents[1]
EXACT = MotionCacheConfig.preset("exact")
CALIBRATION_PROMPTS = 8
SHARE_TOLERANCE, SEARCH_ROUNDS = 0.01, 5
VARIANT_SHARE = 0.3


def distances(samples: list[StepChange], num_steps: int) -> dict[str, dict]:
    """Cache settings of the two distances, from changes measured on exact runs."""
    return {
        "modulation": {"distance": "modulation", "polynomial": fit_polynomial(samples)},
        "table": {"distance": "table", "distance_table": distance_table(samples, num_steps), "polynomial": None},
    }


def per_step(config: MotionCacheConfig, samples: list[StepChange], num_steps: int) -> list[float]:
    """Δ of each step as the config's distance gives it, `[steps]`; the modulation depends on nothing but the step."""
    if config.distance == "table":
        return list(config.distance_table)
    modulation = {sample.step: sample.modulation for sample in samples}
    return [0.0] + [float(np.polyval(config.polynomial, modulation[k])) for k in range(1, num_steps)]


def variants(flowcache: MotionCacheConfig, motioncache: MotionCacheConfig) -> dict[str, MotionCacheConfig]:
    """Changes to the methods that leave the number of computed tokens about as it is."""
    return {
        "motioncache+neighbour-kv/table": motioncache.replace(reused_kv="neighbour"),
        "flowcache+logsnr/table": flowcache.replace(extrapolation="logsnr"),
        "motioncache+logsnr/table": motioncache.replace(extrapolation="logsnr"),
    }


def chunk_level_threshold(changes: list[float], config: MotionCacheConfig, chunks: int, target: float) -> float:
    """The τ with which chunk-level decisions come nearest to a share of token computations.

    Without weights a decision depends on the steps alone, so it can be foretold from Δ per step.

    Args:
        changes: Δ per step, `[steps]`.
        config: for its warm-up.
        chunks: of a window; all but the last are renewed once after their last step, which always counts as computed.
        target: share, 0 to 1.
    """

    def share(threshold: float) -> float:
        computed, accumulated = config.warmup_steps, 0.0
        for change in changes[config.warmup_steps :]:
            accumulated += change
            if accumulated >= threshold:
                computed, accumulated = computed + 1, 0.0
        renewed = (chunks - 1) / chunks
        return (computed + renewed) / (len(changes) + renewed)

    grid = np.geomspace(1e-3, 10, 2000)
    return float(min(grid, key=lambda threshold: abs(share(threshold) - target)))


class Recorder(Policy, Protocol):
    """A policy that computes everything and takes notes."""

    def start_video(self) -> None:
        """A new video begins."""


class Sampler:
    """One process's pipeline."""

    def __init__(self, settings: RunSettings, dtype: torch.dtype = torch.float32) -> None:
        folder = find_checkpoint(settings.model)
        self.windows = check_shapes(settings, inspect_checkpoint(folder))
        self.pipe = load_pipeline(folder, "text", dtype, settings.shift, settings.sigmas)
        self.pipe.set_progress_bar_config(disable=True)
        self.settings = settings

    def sample(
        self,
        prompt: str,
        seed: int,
        config: MotionCacheConfig,
        recorder: Recorder | None = None,
        decode: bool = True,
    ) -> tuple[np.ndarray | None, dict[str, float]]:
        """Make a video: its frames `[frames, height, width, 3]` in [0, 1] if asked for, and what computing it took."""
        settings = dataclasses.replace(self.settings, prompt=prompt, seed=seed)
        generator = Generator(self.pipe, settings, self.windows)
        generator.encode()
        handle = apply_motioncache(self.pipe, config)
        try:
            if recorder is not None:
                recorder.start_video()
                handle.hook.engine.policy = recorder
            denoised = generator.run()
        finally:
            remove_motioncache(self.pipe)
        cost = model_cost(self.pipe.transformer, settings.max_sequence_length)
        totals = handle.trace.totals()
        taken = {
            "share": totals["tokens_computed"] / totals["tokens_total"],
            "flops_share": cost.trace_flops(handle.trace) / cost.exact_flops(handle.trace),
            "seconds": denoised.seconds,
        }
        return generator.decode(denoised.latents) if decode else None, taken


_sampler: Sampler


def _start_process(settings: RunSettings) -> None:
    global _sampler
    torch.set_num_threads(1)
    _sampler = Sampler(settings)


def _record(job: tuple[str, int]) -> list[StepChange]:
    """Changes from step to step in an exact run. Any threshold would do: the recorder computes everything."""
    recorder = ChangeRecorder()
    _sampler.sample(*job, MotionCacheConfig(distance="input", alpha=1.0), recorder, decode=False)
    return recorder.samples


def _search(job: tuple[MotionCacheConfig, float, str]) -> float:
    """Bisect the τ of a token-level method, downwards from the chunk-level one: weights below 1 only slow sums down."""
    config, target, prompt = job
    low, high = 0.2 * config.threshold, config.threshold
    best = (float("inf"), config.threshold)
    for _ in range(SEARCH_ROUNDS):
        threshold = (low * high) ** 0.5
        share = _sampler.sample(prompt, 0, config.replace(threshold=threshold), decode=False)[1]["share"]
        best = min(best, (abs(share - target), threshold))
        if best[0] < SHARE_TOLERANCE:
            break
        low, high = (threshold, high) if share > target else (low, threshold)
    return best[1]


def _evaluate(job: tuple[int, str, dict[str, MotionCacheConfig]]) -> list[dict]:
    """All methods on one prompt, and exact execution in bfloat16, against exact execution with the same noise."""
    index, prompt, configs = job
    exact, exact_taken = _sampler.sample(prompt, index, EXACT)
    rows = [{"prompt": index, "key": "exact", **exact_taken}]
    for key, config in configs.items():
        frames, taken = _sampler.sample(prompt, index, config)
        rows.append({"prompt": index, "key": key, **taken, **_distance_from(frames, exact)})
    # The floor: what rounding alone changes.
    rounded, taken = Sampler(_sampler.settings, torch.bfloat16).sample(prompt, index, EXACT)
    return [*rows, {"prompt": index, "key": "exact-bfloat16", **taken, **_distance_from(rounded, exact)}]


def _distance_from(frames: np.ndarray, exact: np.ndarray) -> dict[str, float]:
    return {"psnr_db": metrics.psnr(frames, exact), "ssim": metrics.ssim(frames, exact)}


class Finished:
    """Results of single jobs, one JSON line each, so that nothing is computed twice.

    Raises:
        UserError: the file belongs to another checkpoint or to other settings.
    """

    def __init__(self, path: Path, settings: RunSettings) -> None:
        self.path = path
        weights = sorted(find_checkpoint(settings.model).rglob("*.safetensors"))
        digest = hashlib.sha256(repr(settings).encode())
        for file in weights:
            digest.update(file.read_bytes())
        self.fingerprint = digest.hexdigest()
        self.results: dict[str, object] = {}
        if path.exists():
            for line in path.read_text().splitlines():
                entry = json.loads(line)
                if entry["fingerprint"] != self.fingerprint:
                    raise UserError(
                        f"{str(path)!r} was made with another checkpoint or config; delete it to start anew"
                    )
                self.results[entry["job"]] = entry["result"]

    def map(self, pool, function, jobs: Iterable[tuple[str, object]]) -> Iterator[object]:
        """Results of `function` for named jobs, in their order; those on file are not computed."""
        jobs = list(jobs)
        waiting = {name: pool.apply_async(function, (job,)) for name, job in jobs if name not in self.results}
        for name, _ in jobs:
            if name in waiting:
                self.results[name] = json.loads(json.dumps(waiting[name].get(), default=dataclasses.asdict))
                entry = {"fingerprint": self.fingerprint, "job": name, "result": self.results[name]}
                with self.path.open("a") as file:
                    file.write(json.dumps(entry) + "\n")
                logger.info("done: %s", name)
            yield self.results[name]


def summarise(rows: list[dict], targets: dict[str, float]) -> list[dict]:
    """Per method and target share: means, and paired differences from the chunk-level method of the same distance."""
    by_key: dict[str, dict[int, dict]] = {}
    for row in rows:
        by_key.setdefault(row["key"], {})[row["prompt"]] = row
    table = []
    for key, of_key in by_key.items():
        if key == "exact":
            continue
        runs = [of_key[i] for i in sorted(of_key)]
        psnr = metrics.paired_difference([r["psnr_db"] for r in runs], [0.0] * len(runs))
        name, _, target = key.partition("@")
        entry = {
            "method": name,
            "target_share": targets.get(key),
            "share": round(float(np.mean([r["share"] for r in runs])), 4),
            "flops_share": round(float(np.mean([r["flops_share"] for r in runs])), 4),
            "psnr_db": round(psnr.mean, 2),
            "psnr_ci95": round(psnr.half_width, 2),
            "ssim": round(float(np.mean([r["ssim"] for r in runs])), 4),
            "n": len(runs),
        }
        kind, _, distance = name.partition("/")
        baseline = by_key.get(f"flowcache/{distance}@{target}")
        if kind != "flowcache" and baseline:
            for metric in ("psnr_db", "ssim"):
                ours, theirs = ([o[i][metric] for i in sorted(of_key)] for o in (of_key, baseline))
                difference = metrics.paired_difference(ours, theirs)
                entry[f"{metric}_minus_chunk_level"] = [round(difference.mean, 4), round(difference.half_width, 4)]
        table.append(entry)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", type=Path, default=ROOT / "configs/skyreels_v2_tiny_slow.yaml")
    parser.add_argument("--prompts", type=int, default=16, help="prompts of the reporting set")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.6, 0.4, 0.3, 0.2])
    parser.add_argument("--processes", type=int, default=multiprocessing.cpu_count())
    parser.add_argument("--output", type=Path, default=ROOT / "results/quality-skyreels-tiny.json")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    settings, _ = load_settings(args.config)
    finished = Finished(args.output.with_suffix(".jobs.jsonl"), settings)
    chunks = latent_frames(settings.num_frames) // settings.causal_block_size
    context = multiprocessing.get_context("spawn")
    with context.Pool(args.processes, _start_process, (settings,)) as pool:
        recording = [(f"record {i}", (p, i)) for i, p in enumerate(prompts("calibration", CALIBRATION_PROMPTS))]
        samples = [StepChange(**s) for part in finished.map(pool, _record, recording) for s in part]
        measured = distances(samples, settings.steps)
        flowcache, searches = {}, []
        for name, distance in measured.items():
            base = settings.cache.replace(**distance)
            for share in args.shares if name == "table" else {VARIANT_SHARE}.intersection(args.shares):
                tau = chunk_level_threshold(per_step(base, samples, settings.steps), base, chunks, share)
                flowcache[name, share] = base.replace(alpha=1.0, threshold=tau)
                job = (base.replace(threshold=tau), share, prompts("choosing", 1)[0])
                searches.append((f"search {name}@{share}", job))
        found = list(finished.map(pool, _search, searches))
        configs, targets = {}, {}
        for ((name, share), config), tau in zip(flowcache.items(), found, strict=True):
            token_level = config.replace(alpha=settings.cache.alpha, threshold=tau)
            pair = {f"flowcache/{name}": config, f"motioncache/{name}": token_level}
            if (name, share) == ("table", VARIANT_SHARE):
                pair |= variants(config, token_level)
            for method, with_threshold in pair.items():
                configs[f"{method}@{share}"], targets[f"{method}@{share}"] = with_threshold, share
        reported = list(enumerate(prompts("reporting", args.prompts)))
        evaluations = [(f"evaluate {i}", (i, p, configs)) for i, p in reported]
        rows = [row for part in finished.map(pool, _evaluate, evaluations) for row in part]
    command = f"python -m benchmarks.quality --config configs/{args.config.name} --prompts {args.prompts}"
    write_json(
        args.output,
        {
            **provenance(command),
            "checkpoint_and_settings": finished.fingerprint,
            "settings": settings.to_dict(),
            "distances": measured,
            "thresholds": {key: config.threshold for key, config in configs.items()},
            "rows": summarise(rows, targets),
            "per_prompt": rows,
        },
    )
    finished.path.unlink()


if __name__ == "__main__":
    main()
