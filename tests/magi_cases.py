"""Reads the reference cases of MAGI-1: weights, inputs, and the parameters each was made with."""

from __future__ import annotations

import inspect
import json
import os
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from magi1_motioncache.captions import ChunkCaptions
from magi1_motioncache.config import SamplingConfig
from magi1_motioncache.plan import SamplingPlan
from magi1_motioncache.special_tokens import SpecialTokenOptions, SpecialTokens
from magi1_motioncache.transformer import Magi1Transformer3DModel

FOLDER = Path(os.environ.get("MAGI_GOLDEN_DIR", Path(__file__).parent / "golden" / "magi1"))
TRUE = ("1", "true", "yes", "y", "on", "enabled")
TOKEN_OPTIONS = {
    "PAD_STATIC": "static_first_frames",
    "PAD_DYNAMIC": "dynamic_first_frames",
    "PAD_BORDERNESS": "borderness",
    "PAD_HQ": "high_quality",
    "PAD_THREE_D_MODEL": "three_d_model",
    "PAD_TWO_D_ANIME": "two_d_anime",
    "PAD_DURATION": "duration",
    "NEG_PROMPT": "negative",
}


@cache
def parameters(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text())


@cache
def tensors(name: str) -> dict[str, Tensor]:
    return load_file(FOLDER / f"{name}.safetensors")


def kind(case: dict[str, Any]) -> str | None:
    """What a parameter file describes, told by what it holds; None for files that only serve other cases."""
    if "names_shapes" in case or set(case) == {"note"}:
        return None
    for name, key in (("step", "cur_denoise_step"), ("run", "yields"), ("schedule", "generate_sequences")):
        if key in case:
            return name
    if "rows" in case:
        return "tokens"
    if "ddconfig" in case:
        return "vae"
    if isinstance(case.get("cases"), list):
        return "cleaning"
    return "unknown"


def cases(wanted: str) -> list[str]:
    names = sorted(path.stem for path in FOLDER.glob("*.json"))
    return [name for name in names if kind(parameters(name)) == wanted]


@cache
def transformer(model: str) -> Magi1Transformer3DModel:
    config = parameters(f"weights_{model}")["config"]
    known = inspect.signature(Magi1Transformer3DModel.__init__).parameters
    net = Magi1Transformer3DModel(**{key: value for key, value in config.items() if key in known}).eval()
    net.load_state_dict({key: value.float() for key, value in tensors(f"weights_{model}").items()})
    return net.requires_grad_(False)


@cache
def special_tokens() -> SpecialTokens:
    stored = np.load(FOLDER / "special_tokens_tiny.npz")
    values = {key: torch.from_numpy(stored[key].astype(np.float16)).float() for key in stored}
    tokens = SpecialTokens(values["caption_token"].shape[1], len(values["other_tokens"]))
    tokens.load_state_dict(values)
    return tokens


def token_options(env: dict[str, str]) -> SpecialTokenOptions:
    chosen = {TOKEN_OPTIONS[name]: value.lower() in TRUE for name, value in env.items() if name in TOKEN_OPTIONS}
    return SpecialTokenOptions(**chosen)


@dataclass(frozen=True)
class Case:
    """One step or run: its parameters, and everything that follows from them."""

    name: str

    @property
    def parameters(self) -> dict[str, Any]:
        return parameters(self.name)

    @property
    def tensors(self) -> dict[str, Tensor]:
        return tensors(self.name)

    @property
    def transformer(self) -> Magi1Transformer3DModel:
        return transformer(self.parameters["model"])

    @property
    def sampling(self) -> SamplingConfig:
        runtime = self.parameters["config"]["runtime_config"]
        engine = self.parameters["config"]["engine_config"]
        known = {field.name for field in fields(SamplingConfig)}
        options = {key: value for key, value in {**runtime, **engine}.items() if key in known}
        scale = self.parameters.get("env", {}).get("prev_chunks_scale")
        if scale is not None:
            options["nearly_clean_scale"] = float(scale)
        options["nearly_clean_threshold"] = engine["distill_nearly_clean_chunk_threshold"]
        return SamplingConfig(**options)

    @property
    def prefix(self) -> Tensor | None:
        key = self.parameters.get("prefix_key")
        return tensors("prefix")[key] if key else None

    @property
    def plan(self) -> SamplingPlan:
        frames = self.parameters["config"]["runtime_config"]["num_frames"]
        return SamplingPlan.for_frames(self.sampling, frames, 0 if self.prefix is None else self.prefix.shape[2])

    @property
    def captions(self) -> ChunkCaptions:
        prompt, plan = tensors("prompt"), self.plan
        return ChunkCaptions.build(
            prompt["caption_embs"][0, 0].float(),
            prompt["emb_masks"][0],
            self.transformer.y_embedder.null_caption_embedding,
            plan.num_chunks,
            plan.offset,
            special_tokens(),
            token_options(self.parameters["env"]),
        )

    @property
    def chunk_tokens(self) -> int:
        runtime = self.parameters["config"]["runtime_config"]
        return runtime["chunk_width"] * (runtime["video_size_h"] // 16) * (runtime["video_size_w"] // 16)

    @property
    def tolerance(self) -> float:
        """Allowed error as a share of the largest value.

        The step size of distilled models enters a sinusoid. The reference took its fp32 frequencies from the exp of
        one processor, which is one unit in the last place off here and there, and the angles move in proportion to the
        step size.
        """
        calls = (call for calls in self.plan.iterations() for call in calls)
        return 1e-5 * max(1.0, max(call.shortcut or 0.0 for call in calls) / 4)


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Largest difference as a share of the reference's largest value."""
    assert value.shape == reference.shape, (value.shape, reference.shape)
    return float((value.float() - reference.float()).abs().max() / reference.float().abs().max())
