"""One run of the MAGI-1 command: what it checks, what it loads, what it adds to the report."""

from __future__ import annotations

from typing import Any

import numpy as np

from common.generator import unknown_words_warning
from common.job import Job
from common.settings import check_overlap
from magi1_motioncache import validate
from magi1_motioncache.adapter import check_config
from magi1_motioncache.caption_cleaning import clean_caption
from magi1_motioncache.folders import find_checkpoint, inspect_checkpoint
from magi1_motioncache.generate import Generator, plan_video
from magi1_motioncache.loading import load_pipeline, place_pipeline
from magi1_motioncache.settings import MODES, RunSettings


class Magi1Job(Job[RunSettings, Generator]):
    """One run of the command (see `Job`)."""

    smaller = "--offload model or group, --set cache.state_device=cpu, or fewer pixels"

    def check(self, image: np.ndarray | None, video: np.ndarray | None) -> str:
        """Check sizes, sampling and tokens against the model and plan the chunks (see `Job.check`)."""
        s = self.settings
        check_config(s.cache)
        self.folder = find_checkpoint(s.model)
        architecture = inspect_checkpoint(self.folder, s.special_tokens_file)
        validate.check_config_file(self.config, architecture)
        self.sampling = validate.check_shapes(s, architecture)
        if video is not None:
            factor = self.sampling.temporal_downsample_factor
            check_overlap(s, len(video), shortest=max(1, len(video) // factor) * factor)
        self.tokens = validate.token_options(s, architecture.has_tokens)
        chunks = plan_video(s, self.sampling).num_chunks
        return f" in {chunks} chunks" if chunks > 1 else ""

    def load(self, image: np.ndarray | None, video: np.ndarray | None) -> Generator:
        """Load the pipeline and encode the prompt (see `Job.load`)."""
        s = self.settings
        pipe = load_pipeline(self.folder, self.dtype, s.special_tokens_file)
        place_pipeline(pipe, self.device, s.offload, s.compile)
        pipe.set_progress_bar_config(disable=True)
        generator = Generator(pipe, s, self.sampling, self.tokens, image, video)
        generator.encode()
        return generator

    def warnings(self, generator: Generator) -> list[str]:
        """What cleaning left of the prompt, and words without a token (see `Job.warnings`)."""
        prompt = clean_caption(self.settings.prompt)
        if not prompt and self.settings.prompt:
            return ["Nothing of this prompt is left for the model, which reads English; the video follows no text."]
        return unknown_words_warning(generator.pipe.tokenizer, prompt)

    def facts(self) -> dict[str, Any]:
        """The mode (see `Job.facts`)."""
        return {"mode": MODES[self.settings.kind]}
