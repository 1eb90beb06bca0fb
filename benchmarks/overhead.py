"""Wall time against the share of the compute: what the cache costs beside the tokens that it computes.

    python -m benchmarks.overhead --threads 1 2

For each model it denoises the same video exactly and in three forms, each at several shares, interleaved, and takes the
fastest of the repeats: noise of a busy machine only ever adds. Exact, which all are compared with, runs first and last.
`motioncache` selects tokens by threshold, as published; `best` computes whole chunks; `budget` computes some tokens at
every step, which has the most calls per token. Writes rows of `model, threads, form, share, flops_share, time_ratio`
with a fitted line for each model, number of threads and form; its intercept is the fixed overhead.
"""

from __future__ import annotations

import logging
import shlex
import sys
import time
from collections.abc import Callable, Sequence
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
from common.cli import Parser, count, run_command
from common.files import make_output_folder, write_json
from common.results import provenance
from skyreels_v2_motioncache import apply_motioncache, remove_motioncache
from skyreels_v2_motioncache.cost import model_cost

logger = logging.getLogger("overhead")
TEXT_TOKENS = 32
ROOT = Path(__file__).resolve().parents[1]
EXACT = MotionCacheConfig.preset("exact")
FORMS: dict[str, tuple[MotionCacheConfig, str, tuple[float, ...]]] = {
    "motioncache": (MotionCacheConfig(chunk_phase=1), "threshold", (0.6, 0.9, 1.3, 1.9, 2.8)),
    "best": (MotionCacheConfig.preset("best"), "threshold", (0.5, 0.9, 1.3, 1.9, 2.8)),
    "budget": (MotionCacheConfig(chunk_phase=0), "budget", (0.1, 0.2, 0.3, 0.4, 0.6, 0.8)),
}
"""By name: settings, and the one that is varied with its values. Steps change the model by `step_changes`."""


def tiny_model() -> tuple[SkyReelsV2DiffusionForcingPipeline, dict]:
    """The trained checkpoint of the repository, with its own settings."""
    pipe = SkyReelsV2DiffusionForcingPipeline.from_pretrained(ROOT / "assets/skyreels-v2-tiny")
    size = {"height": 96, "width": 96, "num_frames": 45, "num_inference_steps": 30, "max_sequence_length": TEXT_TOKENS}
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
    size = {"height": 384, "width": 384, "num_frames": 21, "num_inference_steps": 16}
    prompt = {
        "prompt": None,
        "prompt_embeds": torch.randn(1, TEXT_TOKENS, 256),
        "negative_prompt_embeds": torch.randn(1, TEXT_TOKENS, 256),
    }
    return pipe, {**prompt, **size, "ar_step": 2, "causal_block_size": 2}


MODELS: dict[str, Callable[[], tuple[SkyReelsV2DiffusionForcingPipeline, dict]]] = {
    "skyreels-v2-tiny": tiny_model,
    "skyreels-v2-mid": mid_model,
}


def step_changes(steps: int) -> tuple[float, ...]:
    """A distance table of the steps alone, so that random weights are computed as often as trained ones: 0.5 to 1.5."""
    return tuple(np.linspace(0.5, 1.5, steps).tolist())


def timed_run(
    pipe: SkyReelsV2DiffusionForcingPipeline, call: dict, config: MotionCacheConfig
) -> tuple[float, float, float]:
    """Seconds of one denoising, the share of token computations that it did, and its FLOPs."""
    handle = apply_motioncache(pipe, config)
    began = time.perf_counter()
    pipe(**call, generator=torch.Generator().manual_seed(0), output_type="latent", guidance_scale=5.0)
    seconds = time.perf_counter() - began
    handle.trace.finish()
    totals = handle.trace.totals()
    remove_motioncache(pipe)
    flops = model_cost(pipe.transformer, TEXT_TOKENS).trace_flops(handle.trace)
    return seconds, totals["tokens_computed"] / totals["tokens_total"], flops


def measure(model: str, threads: int, repeats: int) -> tuple[list[dict], list[dict]]:
    """Rows and the fitted lines of one model on so many threads."""
    torch.set_num_threads(threads)
    pipe, call = MODELS[model]()
    pipe.set_progress_bar_config(disable=True)
    table = step_changes(call["num_inference_steps"])
    configs = {("exact", 0.0): EXACT}
    for form, (config, setting, values) in FORMS.items():
        config = config.replace(distance="table", distance_table=table, warmup_steps=1)
        configs |= {(form, value): config.replace(**{setting: value}) for value in values}
    fastest: dict[tuple[str, float], tuple[float, float, float]] = {}
    timed_run(pipe, {**call, "num_inference_steps": 3, "ar_step": 1}, EXACT)  # warm up allocator and threads
    for repeat in range(repeats):
        for case, config in [*configs.items(), (("exact", 0.0), EXACT)]:
            result = timed_run(pipe, call, config)
            fastest[case] = min(fastest.get(case, result), result)
            seconds, share, _ = result
            logger.info("%s on %d, repeat %d, %s %g: %.2f s, share %.3f", model, threads, repeat, *case, seconds, share)
    exact_seconds, _, exact_flops = fastest.pop(("exact", 0.0))
    rows, lines = [], []
    for form in FORMS:
        where = {"model": model, "threads": threads, "form": form}
        own = [
            {
                **where,
                "share": round(share, 4),
                "flops_share": round(flops / exact_flops, 4),
                "time_ratio": round(seconds / exact_seconds, 4),
            }
            for (of, _), (seconds, share, flops) in fastest.items()
            if of == form
        ]
        rows += sorted(own, key=lambda row: row["share"])
        slope, intercept = np.polyfit([r["share"] for r in own], [r["time_ratio"] for r in own], 1)
        lines.append({**where, "slope": round(slope, 4), "intercept": round(intercept, 4)})
    return rows, [{**line, "exact_seconds": round(exact_seconds, 3)} for line in lines]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(lambda: _run(list(sys.argv[1:] if argv is None else argv)))


def _run(arguments: list[str]) -> None:
    parser = Parser.of_module("benchmarks.overhead", __doc__)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), help="which (both)")
    parser.add_argument("--repeats", type=count, default=3, metavar="N", help="of each run (3)")
    parser.add_argument(
        "--threads", nargs="+", type=count, default=[1, 2], metavar="N", help="one after the other (1 2)"
    )
    parser.add_argument("--output", type=Path, default=ROOT / "results/overhead.json", metavar="NAME.json")
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    make_output_folder(args.output.parent)
    measured = [measure(model, threads, args.repeats) for model in args.models for threads in args.threads]
    write_json(
        args.output,
        {
            **provenance(shlex.join(["python", "-m", "benchmarks.overhead", *arguments])),
            "threads": args.threads,
            "lines": [line for _, lines in measured for line in lines],
            "rows": [row for rows, _ in measured for row in rows],
        },
    )


if __name__ == "__main__":
    sys.exit(main())
