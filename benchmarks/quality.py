"""Quality at matched compute: caching methods against exact execution, over many prompts.

    python benchmarks/quality.py --config configs/tiny_slow.yaml --processes 4

Three disjoint sets of prompts are used. On the first the distances are measured, on the second each method's threshold
is searched for every target share of exact's token computations, on the third the methods are compared. Finished videos
are kept in a file beside the results, so an interrupted run goes on where it stopped.
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

import numpy as np
import torch

from common import metrics
from common.cache import MotionCacheConfig
from common.cache.calibration import ChangeRecorder, StepChange, distance_table, fit_polynomial
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
from training.procedural import prompts

logger = logging.getLogger("quality")
ROOT = Path(__file__).resolve().parents[1]
EXACT = MotionCacheConfig.preset("exact")
CALIBRATION_PROMPTS, CHOOSING_PROMPTS = 8, 2
SHARE_TOLERANCE, SEARCH_ROUNDS = 0.01, 9


def methods(base: MotionCacheConfig, table: list[float], polynomial: list[float]) -> dict[str, MotionCacheConfig]:
    """What is compared. Pairs of names that differ in the part before the slash differ in nothing but α.

    Args:
        base: warm-up, phases, vote and minimum share of all methods.
        table, polynomial: distances measured for this model.
    """
    modulation = base.replace(distance="modulation", polynomial=polynomial)
    measured = base.replace(distance="table", distance_table=table, polynomial=None)
    line = measured.replace(extrapolation="logsnr")
    return {
        "flowcache/modulation": modulation.replace(alpha=1.0),
        "motioncache/modulation": modulation,
        "flowcache/table": measured.replace(alpha=1.0),
        "motioncache/table": measured,
        "motioncache+neighbour-kv/table": measured.replace(reused_kv="neighbour"),
        "flowcache/table+logsnr": line.replace(alpha=1.0),
        "motioncache/table+logsnr": line,
    }


class Sampler:
    """One process's pipeline."""

    def __init__(self, settings: RunSettings, dtype: torch.dtype = torch.float32) -> None:
        folder = find_checkpoint(settings.model)
        self.windows = check_shapes(settings, inspect_checkpoint(folder))
        self.pipe = load_pipeline(folder, "text", dtype, settings.shift, settings.sigmas)
        self.pipe.set_progress_bar_config(disable=True)
        self.settings = settings

    def sample(
        self, prompt: str, seed: int, config: MotionCacheConfig, recorder: ChangeRecorder | None = None
    ) -> tuple[np.ndarray, dict[str, float]]:
        """Make a video; its frames `[frames, height, width, 3]` in [0, 1] and what computing it took."""
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
        return generator.decode(denoised.latents), taken


_sampler: Sampler


def _start_process(settings: RunSettings) -> None:
    global _sampler
    torch.set_num_threads(1)
    _sampler = Sampler(settings)


def _record(job: tuple[str, int]) -> list[StepChange]:
    """Changes from step to step in an exact run. Any threshold would do: the recorder computes everything."""
    recorder = ChangeRecorder()
    _sampler.sample(*job, MotionCacheConfig(distance="input", alpha=1.0), recorder)
    return recorder.samples


def _search(job: tuple[str, MotionCacheConfig, float, list[str]]) -> tuple[str, float, float, float]:
    """Bisect a method's threshold, on a logarithmic scale, until it computes the target share."""
    name, config, target, chosen = job
    low, high = 1e-4, 1e2
    best = (float("inf"), 0.0, 0.0)
    for _ in range(SEARCH_ROUNDS):
        threshold = (low * high) ** 0.5
        runs = [_sampler.sample(p, i, config.replace(threshold=threshold))[1] for i, p in enumerate(chosen)]
        share = float(np.mean([run["share"] for run in runs]))
        best = min(best, (abs(share - target), threshold, share))
        if best[0] < SHARE_TOLERANCE:
            break
        low, high = (threshold, high) if share > target else (low, threshold)
    return name, target, best[1], best[2]


def _evaluate(job: tuple[int, str, dict[str, MotionCacheConfig]]) -> list[dict]:
    """All methods on one prompt against exact execution with the same noise."""
    index, prompt, configs = job
    exact, exact_taken = _sampler.sample(prompt, index, EXACT)
    rows = [{"prompt": index, "key": "exact", **exact_taken}]
    for key, config in configs.items():
        frames, taken = _sampler.sample(prompt, index, config)
        rows.append({"prompt": index, "key": key, **taken, **_distance_from(frames, exact)})
    return rows


def _evaluate_floor(job: tuple[int, str]) -> dict:
    """Exact execution in bfloat16 against exact execution in float32: what rounding alone changes."""
    index, prompt = job
    exact, _ = _sampler.sample(prompt, index, EXACT)
    rounded, taken = Sampler(_sampler.settings, torch.bfloat16).sample(prompt, index, EXACT)
    return {"prompt": index, "key": "exact-bfloat16", **taken, **_distance_from(rounded, exact)}


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
        """Results of `function` for named jobs, in any order; those on file are not computed."""
        waiting = {}
        for name, job in jobs:
            if name in self.results:
                yield self.results[name]
            else:
                waiting[name] = pool.apply_async(function, (job,))
        for name, handle in waiting.items():
            result = json.loads(json.dumps(handle.get(), default=dataclasses.asdict))
            with self.path.open("a") as file:
                file.write(json.dumps({"fingerprint": self.fingerprint, "job": name, "result": result}) + "\n")
            logger.info("done: %s", name)
            self.results[name] = result
            yield result


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
    parser.add_argument("--config", type=Path, default=ROOT / "configs/tiny_slow.yaml")
    parser.add_argument("--prompts", type=int, default=16, help="prompts of the reporting set")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.6, 0.4, 0.3, 0.2])
    parser.add_argument("--processes", type=int, default=multiprocessing.cpu_count())
    parser.add_argument("--output", type=Path, default=ROOT / "results/quality-skyreels-tiny.json")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    settings, _ = load_settings(args.config)
    finished = Finished(args.output.with_suffix(".jobs.jsonl"), settings)
    context = multiprocessing.get_context("spawn")
    with context.Pool(args.processes, _start_process, (settings,)) as pool:
        recording = [(f"record {i}", (p, i)) for i, p in enumerate(prompts("calibration", CALIBRATION_PROMPTS))]
        samples = [StepChange(**s) for part in finished.map(pool, _record, recording) for s in part]
        table, polynomial = distance_table(samples, settings.steps), fit_polynomial(samples)
        compared = methods(settings.cache, table, polynomial)
        chosen = prompts("choosing", CHOOSING_PROMPTS)
        searches = [
            (f"search {name}@{share}", (name, config, share, chosen))
            for name, config in compared.items()
            for share in args.shares
        ]
        configs, targets, found = {}, {}, []
        for name, share, threshold, reached in finished.map(pool, _search, searches):
            key = f"{name}@{share}"
            configs[key], targets[key] = compared[name].replace(threshold=threshold), share
            found.append({"method": name, "target_share": share, "threshold": threshold, "share": round(reached, 4)})
        reported = list(enumerate(prompts("reporting", args.prompts)))
        evaluations = [(f"evaluate {i}", (i, p, configs)) for i, p in reported]
        rows = [row for part in finished.map(pool, _evaluate, evaluations) for row in part]
        rows += finished.map(pool, _evaluate_floor, [(f"floor {i}", (i, p)) for i, p in reported])
    command = f"python benchmarks/quality.py --config {args.config.name} --prompts {args.prompts}"
    write_json(
        args.output,
        {
            **provenance(command),
            "checkpoint_and_settings": finished.fingerprint,
            "settings": settings.to_dict(),
            "distance_table": [round(v, 6) for v in table],
            "polynomial": polynomial,
            "thresholds": found,
            "rows": summarise(rows, targets),
            "per_prompt": rows,
        },
    )
    finished.path.unlink()


if __name__ == "__main__":
    main()
