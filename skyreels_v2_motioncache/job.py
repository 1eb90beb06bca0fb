"""One run of the command: everything is checked first, then loaded, generated, compared and written."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from rich.console import Console

from common.cli import Interrupted
from common.console import Reporter, show_log
from common.errors import UserError
from common.files import make_output_folder, write_json
from common.report import motion_picture, pick_chunk, stage_table
from common.runs import Stage, default_output, summary
from common.video import read_image, read_video, side_by_side, write_video
from skyreels_v2_motioncache import loading, validate
from skyreels_v2_motioncache.checkpoint import find_checkpoint, inspect_checkpoint
from skyreels_v2_motioncache.compare import EXACT, STOCK, Comparison, OnVideo, chunk_frames, compare
from skyreels_v2_motioncache.generate import Generator
from skyreels_v2_motioncache.settings import RunSettings
from skyreels_v2_motioncache.windows import Window


class Job:
    """One run of the command.

    Args:
        settings: of the run.
        method: name of its way of caching.
        config: file that the settings came from.
        output: folder to write to; None makes one in `outputs/`.
        command: the command line, for the record.
        compare: also run what the method is compared with.
        console: where to report.
    """

    def __init__(
        self,
        settings: RunSettings,
        method: str,
        config: Path,
        output: Path | None,
        command: str,
        compare: bool = True,
        console: Console | None = None,
    ) -> None:
        self.settings, self.method, self.config, self.command = settings, method, config, command
        self.compare = compare
        self.output = output or default_output(settings.model, method)
        self.console = console or Console()
        self.reporter = Reporter(self.console)

    def run(self) -> None:
        """Do it all.

        Raises:
            UserError: something is wrong with the input, found before anything is generated; or the GPU is too small.
            Interrupted: Ctrl-C.
        """
        s = self.settings
        self.device = loading.resolve_device(s.device)
        self.dtype = loading.resolve_dtype(s.dtype, self.device)
        loading.check_offload(s.offload, self.device)
        image = None if s.image is None else np.asarray(read_image(s.image))
        video = None if s.video is None else read_video(s.video)
        architecture = inspect_checkpoint(find_checkpoint(s.model, weights=False), weights=False)
        windows = validate.check_shapes(s, architecture)
        validate.check_given_video(s, video, architecture.temporal_factor)
        is_new = not self.output.exists()
        make_output_folder(self.output)
        try:
            self._announce(windows)
            generator = self._load(windows, image, video)
            result = compare(generator, self.method, self.reporter, self._saver(generator), not self.compare)
            self._write(generator, result)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"the GPU's memory does not suffice ({error}); use --offload model or group, "
                f"--set cache.state_device=cpu, --set stock=none, or fewer pixels or frames; {self._what_is_complete()}"
            ) from error
        except KeyboardInterrupt as interrupt:
            raise Interrupted(self._what_is_complete()) from interrupt
        finally:
            if is_new and not any(self.output.iterdir()):
                self.output.rmdir()
        self._report(result)

    def _announce(self, windows: list[Window]) -> None:
        s = self.settings
        show_log(self.console)
        for library in (diffusers, transformers):  # their notes on loading are for their developers
            library.utils.logging.set_verbosity_error()
            library.utils.logging.disable_progress_bar()
        in_windows = f" in {len(windows)} windows" if len(windows) > 1 else ""
        self.reporter.note(f"[bold]{s.model}[/bold], {self.config.name}, {self.method}")
        self.reporter.note(
            f"{s.num_frames} frames{in_windows}, {s.height}x{s.width}, {s.steps} steps, seed {s.seed}, "
            f"{self.device}, {_name(self.dtype)}"
        )
        self.reporter.note(f'"{s.prompt}"')

    def _load(self, windows: list[Window], image: np.ndarray | None, video: np.ndarray | None) -> Generator:
        s = self.settings
        with self.reporter.busy("loading the model"):
            folder = find_checkpoint(s.model)
            inspect_checkpoint(folder)
            pipe = loading.load_pipeline(folder, s.kind, self.dtype, s.shift, s.sigmas)
            loading.place_pipeline(pipe, self.device, s.offload)
            pipe.set_progress_bar_config(disable=True)
            generator = Generator(pipe, s, windows, image, video)
            generator.encode()
        if unknown := generator.unknown_words():
            self.reporter.note(f"This model does not know the words: {', '.join(unknown)}. It ignores what they mean.")
        return generator

    def _saver(self, generator: Generator) -> OnVideo:
        """Writes a stage's video as soon as it is decoded. The stock one looks like the exact one and is not kept."""

        def on_video(name: str, frames: np.ndarray) -> None:
            if name != STOCK:
                file = "video.mp4" if name == self.method else f"{name}.mp4"
                write_video(self.output / file, generator.with_given(frames), self.settings.fps)

        return on_video

    def _write(self, generator: Generator, result: Comparison) -> None:
        with self.reporter.busy("writing results"):
            write_json(self.output / "trace.json", result.trace.to_dict(), indent=None)
            self._write_pictures(generator, result)
            write_json(self.output / "summary.json", summary(result.stages, result.tokens_total, self._facts(result)))

    def _write_pictures(self, generator: Generator, result: Comparison) -> None:
        reference = EXACT if self.method != EXACT else STOCK
        if reference in result.videos:
            names = (reference, self.method)
            stages = {stage.name: stage for stage in result.stages}
            labels = [_label(stages[name], result.tokens_total) for name in names]
            panes = [generator.with_given(result.videos[name]) for name in names]
            write_video(self.output / "side_by_side.mp4", side_by_side(panes, labels), self.settings.fps)
        if result.trace.maps:
            window, chunk = pick_chunk(result.trace)
            frames = chunk_frames(generator, result.videos[self.method], window, chunk)
            where = f"chunk {chunk + 1}" + (f" of window {window + 1}" if window else "")
            title = f'{self.method}, {where}: "{self.settings.prompt}"'
            motion_picture(self.output / "motion.png", result.trace, window, chunk, frames, title)

    def _facts(self, result: Comparison) -> dict[str, Any]:
        s = self.settings
        on_gpu = self.device.type == "cuda"
        return {
            "model": s.model,
            "method": self.method,
            "tag": s.cache.tag,
            "config": s.to_dict(),
            "config_file": str(self.config),
            "command": self.command,
            "seed": s.seed,
            "device": str(self.device),
            "device_name": torch.cuda.get_device_name(self.device) if on_gpu else platform.machine(),
            "threads": torch.get_num_threads(),
            "dtype": _name(self.dtype),
            "height": s.height,
            "width": s.width,
            "num_frames": s.num_frames,
            "steps": s.steps,
            "exact_vs_stock_max_error": result.stock_difference,
        }

    def _report(self, result: Comparison) -> None:
        s = self.settings
        self.console.print()
        self.console.print(stage_table(result.stages, result.tokens_total, f"{s.model}, {self.method}"))
        if result.stock_difference is not None:
            self.reporter.note(
                f"largest difference of exact's final latents from stock's: {result.stock_difference:.1e}"
            )
            if s.prefix_noise == "frozen" and s.addnoise_condition > 0 and result.has_prefix:
                self.reporter.note("  (stock draws the noise on given frames anew each time: --set prefix_noise=fresh)")
        self.reporter.note("")
        for file in sorted(self.output.iterdir()):
            self.console.print(str(file), highlight=False, soft_wrap=True)

    def _what_is_complete(self) -> str:
        files = sorted(file.name for file in self.output.iterdir() if not file.name.startswith("."))
        return f"complete in {self.output}: {', '.join(files)}" if files else "nothing was complete yet"


def _label(stage: Stage, tokens_total: int) -> list[str]:
    quality = "" if stage.psnr_db is None else f", {stage.psnr_db:.1f} dB"
    return [stage.name, f"{100 * stage.tokens_computed / tokens_total:.0f} % of tokens, {stage.seconds:.1f} s{quality}"]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
