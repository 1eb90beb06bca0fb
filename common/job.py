"""One run of a command: everything is checked first, then loaded, generated, compared and written."""

from __future__ import annotations

import platform
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from rich.console import Console
from rich.text import Text

from common.background import Background
from common.cli import Interrupted
from common.compare import EXACT, STOCK, Comparison, NotFiniteError, compare
from common.compiling import check_compiler, room_for_graphs
from common.console import Reporter, quiet_libraries, show_log
from common.devices import check_offload, dtype_name, resolve_device, resolve_dtype
from common.errors import UserError
from common.files import make_output_folder, set_aside, write_json
from common.generator import Generator
from common.report import motion_picture, pick_chunk, stage_table
from common.runs import Stage, default_output, summary
from common.settings import RunSettings
from common.video import GrowingVideo, read_image, read_video, side_by_side, write_video

RESULTS = ("video.mp4", "exact.mp4", "side_by_side.mp4", "motion.png", "trace.json", "summary.json")
"""Files of a run."""
PARTS_IN_HAND = 2
"""Decoded parts of a video that may be written while the GPU goes on: the one in the encoder, and one behind it."""
WIDER = {torch.float16: "use --dtype bfloat16", torch.bfloat16: "use --dtype float32"}
"""What to do when a dtype's range does not suffice."""
BROKEN = "the checkpoint's weights may be damaged: fetch it again"
S = TypeVar("S", bound=RunSettings)
G = TypeVar("G", bound=Generator)


class Job(ABC, Generic[S, G]):
    """One run of a command. A model's package says how its settings are checked and how its pipeline is loaded.

    Args:
        settings: of the run.
        method: name of its way of caching.
        config: file that the settings came from.
        output: folder to write to; None makes one in `outputs/`. Results of an earlier run in it are set aside.
        command: the command line, for the record.
        compare: also run what the method is compared with.
        console: where to report.
    """

    smaller: str
    """Options that need less of a GPU's memory, for the message when it does not suffice."""

    def __init__(
        self,
        settings: S,
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
        self._growing: dict[str, GrowingVideo] = {}
        self._written: list[str] = []

    @abstractmethod
    def check(self, image: np.ndarray | None, video: np.ndarray | None) -> str:
        """Find everything that is wrong with the settings, from the checkpoint's small files alone.

        Args:
            image: `[height, width, 3]` uint8, the given one.
            video: `[frames, height, width, 3]` uint8, the given one.

        Returns:
            What the video's frames are made in, for the announcement: `" in 2 windows"`, or nothing.

        Raises:
            UserError: names the value and what is allowed.
        """

    @abstractmethod
    def load(self, image: np.ndarray | None, video: np.ndarray | None) -> G:
        """Load the pipeline onto the device and encode the inputs; called after `check`."""

    @abstractmethod
    def warnings(self, generator: G) -> list[str]:
        """What the user should know about the prompt before it is generated."""

    def facts(self) -> dict[str, Any]:
        """What `summary.json` says of the run that only this model has."""
        return {}

    def remarks(self, generator: G, result: Comparison) -> list[str]:
        """Lines under the closing table that only this model has."""
        return []

    def run(self) -> None:
        """Do it all.

        Raises:
            UserError: something is wrong with the input, found before anything is generated; or the GPU is too small,
                the disk full, or the dtype's range too small for the model.
            Interrupted: Ctrl-C.
        """
        s = self.settings
        self.device = resolve_device(s.device)
        self.dtype = resolve_dtype(s.dtype, self.device)
        check_offload(s.offload, self.device)
        self._writing = Background(unfinished=0 if self.device.type == "cpu" else PARTS_IN_HAND)
        image = None if s.image is None else np.asarray(read_image(s.image))
        video = None if s.video is None else read_video(s.video, s.fps)
        made_in = self.check(image, video)
        before = 0 if video is None else len(video) - s.overlap_history
        self._all_frames = before + s.num_frames
        if s.compile:
            with self.reporter.busy("trying the compiler"):
                check_compiler(self.device)
        is_new = not self.output.exists()
        make_output_folder(self.output)
        try:
            self._announce(made_in)
            with self.reporter.busy("loading the model"):
                generator = self.load(image, video)
            for line in self.warnings(generator):
                self.reporter.note(line)
            self._set_aside()
            with room_for_graphs() if s.compile else nullcontext():
                result = compare(generator, self.method, s.cache, self.reporter, self._save, not self.compare)
            self._report(generator, result)
            self._write(generator, result)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"the GPU's memory does not suffice ({error}); use {self.smaller}; {self._what_is_complete()}"
            ) from error
        except NotFiniteError as error:
            raise UserError(
                f"{error}, with dtype {dtype_name(self.dtype)}; {WIDER.get(self.dtype, BROKEN)}; "
                f"{self._what_is_complete()}"
            ) from error
        except KeyboardInterrupt as interrupt:
            raise Interrupted(self._what_is_complete()) from interrupt
        finally:
            self._writing.close()
            for video_file in self._growing.values():
                video_file.close()
            if is_new and not any(self.output.iterdir()):
                self.output.rmdir()
        self.reporter.note("")
        for name in sorted(self._complete()):
            self.console.print(Text(str(self.output / name)), soft_wrap=True)

    def _announce(self, made_in: str) -> None:
        s = self.settings
        show_log(self.console)
        quiet_libraries()
        self.reporter.note(f", {self.config.name}, {self.method}", head=s.model)
        self.reporter.note(
            f"{s.num_frames} frames{made_in}, {s.height}x{s.width}, {s.steps} steps, seed {s.seed}, "
            f"{self.device}, {dtype_name(self.dtype)}"
        )
        self.reporter.note(f'"{s.prompt}"')
        if s.compile:
            self.reporter.note("the transformer's blocks are compiled, in every stage, at the first call of each kind")

    def _save(self, name: str, frames: np.ndarray) -> None:
        """Have a stage's next frames written as soon as they are decoded. The stock video looks like the exact one.

        A GPU denoises the next chunk or stage meanwhile. On a CPU the encoder would take cores from what is being
        timed, so the run waits for it, while the clock stands.
        """
        if name == STOCK:
            return
        if name not in self._growing:
            file = "video.mp4" if name == self.method else f"{name}.mp4"
            self._growing[name] = GrowingVideo(self.output / file, self.settings.fps)
        with self._writes():
            self._writing.submit(partial(self._growing[name].append, frames))

    def _set_aside(self) -> None:
        with self._writes():
            earlier = set_aside(self.output, RESULTS)
        if earlier is not None:
            self.reporter.note(f"results of an earlier run in this folder are now in {earlier}")

    def _write(self, generator: G, result: Comparison) -> None:
        """Write all that is not written yet: figures first, so that no picture can cost them."""
        with self._writes(), self.reporter.busy("writing results"):
            self._writing.wait()
            write_json(self.output / "summary.json", summary(result.stages, result.tokens_total, self._facts(result)))
            self._written.append("summary.json")
            write_json(self.output / "trace.json", result.trace.to_dict(), indent=None)
            self._written.append("trace.json")
            self._write_pictures(generator, result)

    @contextmanager
    def _writes(self) -> Iterator[None]:
        """Tell in one line that something cannot be written, and what is there all the same."""
        try:
            yield
        except OSError as error:
            reason = error.strerror or str(error)
            raise UserError(f"cannot write to {self.output}: {reason}; {self._what_is_complete()}") from error

    def _write_pictures(self, generator: G, result: Comparison) -> None:
        reference = EXACT if self.method != EXACT else STOCK
        if reference in result.videos:
            names = (reference, self.method)
            stages = {stage.name: stage for stage in result.stages}
            labels = [_label(stages[name], result.tokens_total) for name in names]
            panes = [generator.with_given(result.videos[name]) for name in names]
            write_video(self.output / "side_by_side.mp4", side_by_side(panes, labels), self.settings.fps)
            self._written.append("side_by_side.mp4")
        if result.trace.maps:
            window, chunk = pick_chunk(result.trace)
            frames = generator.chunk_frames(result.videos[self.method], window, chunk)
            where = f"chunk {chunk + 1}" + (f" of window {window + 1}" if window else "")
            title = f'{self.method}, {where}: "{self.settings.prompt}"'
            motion_picture(self.output / "motion.png", result.trace, window, chunk, frames, title)
            self._written.append("motion.png")

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
            "dtype": dtype_name(self.dtype),
            "height": s.height,
            "width": s.width,
            "num_frames": s.num_frames,
            "steps": s.steps,
            "exact_vs_stock_max_error": result.stock_difference,
            **self.facts(),
        }

    def _report(self, generator: G, result: Comparison) -> None:
        s = self.settings
        self.console.print()
        self.console.print(stage_table(result.stages, result.tokens_total, f"{s.model}, {self.method}", s.compile))
        if result.stock_difference is not None:
            self.reporter.note(
                f"largest difference of exact's final latents from stock's: {result.stock_difference:.1e}"
            )
        for line in self.remarks(generator, result):
            self.reporter.note(line)

    def _what_is_complete(self) -> str:
        # A second Ctrl-C does not wait for the parts that are still to be written; on a full disk none follow.
        with suppress(KeyboardInterrupt, OSError):
            self._writing.wait()
        files = []
        for name, frames in sorted(self._complete().items()):
            part = f" (frames 1 to {frames} of {self._all_frames})" if frames < self._all_frames else ""
            files.append(name + part)
        return f"complete in {self.output}: {', '.join(files)}" if files else "nothing was complete yet"

    def _complete(self) -> dict[str, int]:
        """Names of the files that this run has written, and how many of the video's frames each covers."""
        videos = {video.path.name: video.frames for video in self._growing.values() if video.frames}
        return {**videos, **dict.fromkeys(self._written, self._all_frames)}


def _label(stage: Stage, tokens_total: int) -> list[str]:
    quality = "" if stage.psnr_db is None else f", {stage.psnr_db:.1f} dB"
    return [stage.name, f"{100 * stage.tokens_computed / tokens_total:.0f} % of tokens, {stage.seconds:.1f} s{quality}"]
