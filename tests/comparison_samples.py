"""Folders of samples without videos, as `benchmarks.sample` and `benchmarks.score` leave them behind."""

import json
from pathlib import Path

from common.cache import Record, Trace
from common.settings import CONFIGS
from skyreels_v2_motioncache.settings import load_settings

SKYREELS = "skyreels_v2_tiny_slow.yaml"


def write_samples(root: Path, methods: dict[str, tuple[float, float]], prompts: int = 3, **cache) -> Path:
    """Summaries, scores and the record of the experiment.

    Args:
        root: the folder.
        methods: per name, share of exact's compute and mean PSNR in dB; prompt i has `i` dB more.
        prompts: how many.
        cache: per method, cache settings that differ from the config's.
    """
    settings = load_settings(CONFIGS / SKYREELS)[0].to_dict()
    stems = [f"{i:04d}-prompt" for i in range(prompts)]
    for method, (share, psnr) in methods.items():
        (root / method).mkdir(parents=True)
        for i, stem in enumerate(stems):
            own = settings["cache"] | cache.get(method, {})
            facts = {
                "fingerprint": f"{method}-{i}",
                "model": "skyreels-v2-tiny",
                "method": method,
                "seconds": 10.0 * share * (i + 1),
                "flops": 2e12 * share,
                "tokens_computed": 1000 * share,
                "tokens_total": 1000,
                "peak_bytes": {} if method == "stock" else {"kv": 4096, "total": 9000},
                "dtype": "float32",
                "device": "cpu",
                "threads": 1,
                "versions": {"torch": "2.13.0", "diffusers": "0.42.1"},
                "commit": "abc",
                "run": "first",
                "config": {**settings, "cache": None if method == "stock" else own},
                "files": {},
            }
            write(root / method / f"{stem}.json", facts)
            write(root / method / f"{stem}.trace.json", trace_of(share).to_dict())
            if method != "exact":
                scores = {"fingerprint": f"{method}-{i}", "reference": f"exact-{i}"}
                write(root / method / f"{stem}.scores.json", scores | {"psnr_db": psnr + i, "ssim": 0.9, "lpips": None})
    command = "python -m benchmarks.sample EXPERIMENT --output OUT"
    write(root / "experiment.json", {"command": command, "methods": list(methods), "stems": stems})
    return root


def write(path: Path, data) -> None:
    path.write_text(json.dumps(data))


def trace_of(share: float, chunks: int = 2, steps: int = 10) -> Trace:
    """Every step of every chunk computes the same share of its 100 tokens."""
    tokens = min(round(100 * share), 100)
    decision = {0: "reuse", 100: "full"}.get(tokens, "select")
    return Trace(
        records=[
            Record(0, step, chunk, "cond", step, "denoise", decision, tokens, 100, 100 * (chunk + 1))
            for step in range(steps)
            for chunk in range(chunks)
        ]
    )
