"""One run of the SkyReels-V2 command: what it checks, what it loads, what it adds to the report."""

from __future__ import annotations

import numpy as np

from common.compare import Comparison
from common.generator import unknown_words_warning
from common.job import Job
from skyreels_v2_motioncache import loading, validate
from skyreels_v2_motioncache.checkpoint import find_checkpoint, inspect_checkpoint
from skyreels_v2_motioncache.generate import Generator
from skyreels_v2_motioncache.settings import RunSettings


class SkyReelsJob(Job[RunSettings, Generator]):
    """One run of the command (see `Job`)."""

    smaller = "--offload model or group, --set cache.state_device=cpu, --set stock=none, or fewer pixels or frames"

    def check(self, image: np.ndarray | None, video: np.ndarray | None) -> str:
        """Check sizes against the model and plan the windows (see `Job.check`)."""
        s = self.settings
        architecture = inspect_checkpoint(find_checkpoint(s.model, weights=False), weights=False)
        validate.check_config_file(self.config, architecture)
        self.windows = validate.check_shapes(s, architecture)
        validate.check_given_video(s, video, architecture.temporal_factor)
        return f" in {len(self.windows)} windows" if len(self.windows) > 1 else ""

    def load(self, image: np.ndarray | None, video: np.ndarray | None) -> Generator:
        """Load the stock pipeline for the kind of input, and encode prompts (see `Job.load`)."""
        s = self.settings
        folder = find_checkpoint(s.model)
        inspect_checkpoint(folder)
        pipe = loading.load_pipeline(folder, s.kind, self.dtype, s.shift, s.sigmas)
        loading.place_pipeline(pipe, self.device, s.offload, s.compile)
        pipe.set_progress_bar_config(disable=True)
        generator = Generator(pipe, s, self.windows, image, video)
        generator.encode()
        return generator

    def warnings(self, generator: Generator) -> list[str]:
        """Words without a token (see `Job.warnings`)."""
        return unknown_words_warning(generator.pipe.tokenizer, self.settings.prompt)

    def remarks(self, generator: Generator, result: Comparison) -> list[str]:
        """Why exact and stock differ on given frames (see `Job.remarks`)."""
        s = self.settings
        fresh = s.prefix_noise == "frozen" and s.addnoise_condition > 0 and generator.has_prefix
        if result.stock_difference is None or not fresh:
            return []
        return ["  (stock draws the noise on given frames anew each time: --set prefix_noise=fresh)"]
