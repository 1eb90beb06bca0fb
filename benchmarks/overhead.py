"""Wall time against token share: what the cache costs beside the tokens that it computes.

    python -m benchmarks.overhead --threads 2

For each model it denoises the same video exactly and in budget form at several shares, interleaved, and takes the
fastest of the repeats: noise of a busy machine only ever adds. Writes rows of `model, share, time_ratio` with a fitted
line per model; its intercept is the fixed overhead.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKLWan,
    SkyReelsV2DiffusionForcingPipeline,
    SkyReelsV2Transformer3DModel,
    UniPCMultistepScheduler,
)

from common.cache import MotionCacheConfig
from common.files import write_json
from common.results import provenance
from skyreels_v2_motioncache import apply_motioncache, remove_motioncache

logger = logging.getLogger("overhead")
ROOT = Path(__file__).resolve().parents[1]
SHARES = (0.2, 0.3, 0.4, 0.6, 0.8)


def tiny_model() -> tuple[SkyReelsV2DiffusionForcingPipeline, dict]:
    """The trained checkpoint of the repository, with its own settings."""
    pipe = SkyReelsV2DiffusionForcingPipeline.from_pretrained(ROOT / "assets/skyreels-v2-tiny")
    size = {"height": 96, "width": 96, "num_frames": 45, "num_inference_steps": 30, "max_sequence_length": 32}
    return pipe, {"prompt": "a red circle moving right", **size, "ar_step": 5, "causal_block_size": 3}


def mid_model() -> tuple[SkyReelsV2DiffusionForcingPipeline, dict]:
    """Random weights, large enough that matrix products dominate: 29 M parameters, 1152 tokens per chunk."""
    torch.manual_seed(0)
    transformer = SkyReelsV2Transformer3DModel(
        num_attention_heads=8,
        attention_head_dim=64,
        in_channels=16,
        out_channels=16,
        text_dim=256,
        ffn_dim=2048,
        num_layers=8,
        num_frame_per_block=2,
    ).eval()
    vae = AutoencoderKLWan(base_dim=8, dim_mult=[1, 1, 1, 1], num_res_blocks=1).eval()
    scheduler = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=5.0)
    pipe = SkyReelsV2DiffusionForcingPipeline(None, None, transformer, vae, scheduler)
    size = {"height": 384, "width": 384, "num_frames": 21, "num_inference_steps": 8}
    prompt = {
        "prompt": None,
        "prompt_embeds": torch.randn(1, 32, 256),
        "negative_prompt_embeds": torch.randn(1, 32, 256),
    }
    return pipe, {**prompt, **size, "ar_step": 2, "causal_block_size": 2}


MODELS: dict[str, Callable[[], tuple[SkyReelsV2DiffusionForcingPipeline, dict]]] = {
    "skyreels-v2-tiny": tiny_model,
    "skyreels-v2-mid": mid_model,
}


def timed_run(pipe: SkyReelsV2DiffusionForcingPipeline, call: dict, config: MotionCacheConfig) -> tuple[float, float]:
    """Seconds of one denoising, and the share of token computations that it did."""
    handle = apply_motioncache(pipe, config)
    began = time.perf_counter()
    pipe(**call, generator=torch.Generator().manual_seed(0), output_type="latent", guidance_scale=5.0)
    seconds = time.perf_counter() - began
    totals = handle.trace.totals()
    remove_motioncache(pipe)
    return seconds, totals["tokens_computed"] / totals["tokens_total"]


def measure(model: str, repeats: int) -> dict:
    """Rows and the fitted line of one model."""
    pipe, call = MODELS[model]()
    pipe.set_progress_bar_config(disable=True)
    # One whole step, then tokens at every step: the share of the run is close to the budget.
    select = MotionCacheConfig(distance="input", warmup_steps=1, chunk_phase=0)
    configs = {1.0: MotionCacheConfig.preset("exact")} | {share: select.replace(budget=share) for share in SHARES}
    fastest: dict[float, tuple[float, float]] = {}
    timed_run(pipe, {**call, "num_inference_steps": 3, "ar_step": 1}, configs[1.0])  # warm up allocator and threads
    for repeat in range(repeats):
        for budget, config in configs.items():
            result = timed_run(pipe, call, config)
            fastest[budget] = min(fastest.get(budget, result), result)
            logger.info("%s repeat %d budget %.1f: %.2f s, share %.3f", model, repeat, budget, *result)
    exact_seconds = fastest.pop(1.0)[0]
    rows = [
        {"model": model, "share": round(share, 4), "time_ratio": round(seconds / exact_seconds, 4)}
        for seconds, share in fastest.values()
    ]
    slope, intercept = np.polyfit([r["share"] for r in rows], [r["time_ratio"] for r in rows], 1)
    line = {"slope": round(slope, 4), "intercept": round(intercept, 4), "exact_seconds": round(exact_seconds, 3)}
    return {"rows": rows, "line": line}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=ROOT / "results/overhead.json")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(args.threads)
    measured = {model: measure(model, args.repeats) for model in args.models}
    write_json(
        args.output,
        {
            **provenance(f"python -m benchmarks.overhead --threads {args.threads} --repeats {args.repeats}"),
            "lines": {model: m["line"] for model, m in measured.items()},
            "rows": [row for m in measured.values() for row in m["rows"]],
        },
    )


if __name__ == "__main__":
    main()
