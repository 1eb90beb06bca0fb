"""What a person looks at after a run: the table on the console and the picture of what was computed where."""

from __future__ import annotations

import warnings
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from rich import box
from rich.table import Table
from rich.text import Text

from common.cache import Record, Trace
from common.cache.trace import StepMaps
from common.files import atomic_path
from common.runs import Stage, find_stage, speedup
from common.units import scaled
from common.video import to_uint8

MAX_ROWS = 4
"""Steps shown in a motion picture."""
COMPUTED_COLOUR = (235, 95, 0)


def stage_table(stages: list[Stage], tokens_total: int, title: str, compiled: bool = False) -> Table:
    """The closing table: what each way of making the video computed, took, and cost in quality.

    Args:
        stages: in the order they ran.
        tokens_total: token computations of exact execution.
        title: line over the table.
        compiled: whether blocks were compiled, as far as that fell into the times.
    """
    table = Table(title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.title = Text(title, style="table.title")  # a path may hold what rich takes for markup
    table.add_column("", overflow="fold", min_width=16)
    stock, exact = find_stage(stages, "stock"), find_stage(stages, "exact")
    against_stock = () if stock is None else ("vs\nstock",)
    for column in ("tokens", "share", "FLOPs", "time", *against_stock, "vs\nexact", "PSNR\ndB", "SSIM"):
        table.add_column(column, justify="right", no_wrap=True)
    for stage in stages:
        estimated = "" if stage.measured_iterations is None else "≈"
        table.add_row(
            Text(stage.name),
            scaled(stage.tokens_computed),
            f"{100 * stage.tokens_computed / tokens_total:.0f} %",
            scaled(stage.flops),
            f"{estimated}{stage.seconds:{'.0f' if stage.seconds >= 100 else '.1f'}} s",
            *(() if stock is None else (_times(speedup(stage, stock)),)),
            _times(speedup(stage, exact)),
            _number(stage.psnr_db, "{:.2f}"),
            _number(stage.ssim, "{:.4f}"),
        )
    notes = [
        "tokens: computed, over all iterations and branches; share: of exact's",
        "time: denoising alone; PSNR, SSIM: against exact",
    ]
    if compiled:
        notes.append("time: includes compiling blocks for what the first iteration did not meet")
    notes += [
        f"≈: {stage.name} scaled up from {stage.measured_iterations} measured iterations."
        for stage in stages
        if stage.measured_iterations is not None
    ]
    table.caption = "\n".join(notes)
    return table


def pick_chunk(trace: Trace) -> tuple[int, int]:
    """Window and chunk that a motion picture tells most about: the one with the most steps of chosen tokens.

    Raises:
        ValueError: the trace holds no maps.
    """
    if not trace.maps:
        raise ValueError("the trace holds no maps; record it with keep_maps=True")
    selects: dict[tuple[int, int], int] = {}
    for maps in trace.maps:
        key = (maps.record.window, maps.record.chunk)
        selects[key] = selects.get(key, 0) + (maps.record.decision == "select")
    return max(selects, key=lambda key: (selects[key], key))


@contextmanager
def _missing_glyphs_allowed() -> Iterator[None]:
    """No warnings about characters that the font lacks: `summary.json` has the whole prompt."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph \d+ .*missing from font")
        yield


@_missing_glyphs_allowed()
def motion_picture(path: Path, trace: Trace, window: int, chunk: int, frames: np.ndarray, title: str) -> None:
    """Draw a chunk's decoded frames, and under them, for a few steps, motion weights and what was computed.

    Args:
        path: PNG file to write.
        trace: recorded with `keep_maps=True`.
        window, chunk: which chunk to show; `pick_chunk` names a telling one.
        frames: `[frames of the chunk, height, width, 3]`, one decoded frame for each of its latent frames.
        title: line over the picture; cut to its width, with boxes for what its font lacks.
    """
    steps = _pick_steps([m for m in trace.maps if (m.record.window, m.record.chunk) == (window, chunk)])
    frames = to_uint8(frames)
    count, height, width = frames.shape[:3]
    floor = min(float(m.weights.min()) for m in steps)
    scale = Normalize(floor if floor < 1 else 0.0, 1.0)
    colours = matplotlib.colormaps["inferno"]

    pane = 1.55
    ratio = [height / width] * (len(steps) + 1)
    figure = Figure(figsize=(1.5 + pane * 2 * count, 1.2 + pane * sum(ratio) * 1.12), dpi=110)
    FigureCanvasAgg(figure)
    top, left, right, bottom = 1 - 0.62 / figure.get_figheight(), 1.45 / figure.get_figwidth(), 0.985, 0.02
    grid = figure.add_gridspec(
        len(steps) + 1,
        2 * count,
        left=left,
        right=right,
        top=top,
        bottom=bottom + 0.5 / figure.get_figheight(),
        wspace=0.06,
        hspace=0.1,
    )
    _write_title(figure, title)
    for column in range(count):
        axes = figure.add_subplot(grid[0, 2 * column : 2 * column + 2])
        axes.imshow(frames[column])
        axes.set_title(f"latent frame {column + 1} of {count}", fontsize=9)
        _bare(axes)
        if column == 0:
            _row_label(figure, axes, left, "decoded\nframe")
    for row, maps in enumerate(steps, start=1):
        for column in range(count):
            weights = figure.add_subplot(grid[row, 2 * column])
            weights.imshow(maps.weights[column].numpy(), cmap=colours, norm=scale, interpolation="nearest")
            weights.set_aspect(maps.weights.shape[2] * height / (maps.weights.shape[1] * width))
            mask = figure.add_subplot(grid[row, 2 * column + 1])
            mask.imshow(_marked(frames[column], maps.computed[column].numpy()))
            for axes in (weights, mask):
                _bare(axes)
            if row == 1:
                weights.set_title("weight", fontsize=8)
                mask.set_title("computed", fontsize=8)
            if column == 0:
                _row_label(figure, weights, left, _describe(maps.record))
    bar_axes = figure.add_axes((left, 0.34 / figure.get_figheight(), 0.24, 0.1 / figure.get_figheight()))
    bar = figure.colorbar(ScalarMappable(scale, colours), cax=bar_axes, orientation="horizontal")
    bar.ax.tick_params(labelsize=7)
    figure.text(
        left + 0.26,
        0.36 / figure.get_figheight(),
        "motion weight of a token          orange: computed at this step, grey: reused",
        fontsize=8,
        va="center",
    )
    with atomic_path(path) as partial:
        figure.savefig(partial)


def _pick_steps(maps: list[StepMaps]) -> list[StepMaps]:
    """A few steps of one branch: where tokens were chosen, then where weights differ, then any; spread evenly."""
    branch = maps[0].record.branch
    maps = [m for m in maps if m.record.branch == branch]
    chosen = [m for m in maps if m.record.decision == "select"]
    if len(chosen) < MAX_ROWS:
        others = [m for m in maps if m.record.decision != "select"]
        others = [m for m in others if m.weights.min() < m.weights.max()] or others
        chosen += _spread(others, MAX_ROWS - len(chosen))
    return sorted(_spread(chosen, MAX_ROWS), key=lambda m: m.record.step)


def _spread(items: list, count: int) -> list:
    if len(items) <= count:
        return items
    return [items[round(i)] for i in np.linspace(0, len(items) - 1, count)] if count > 1 else items[-1:]


def _marked(frame: np.ndarray, computed: np.ndarray) -> np.ndarray:
    """The frame in light grey, computed tokens tinted: legible over dark and bright pictures alike."""
    rows = np.linspace(0, computed.shape[0], frame.shape[0], endpoint=False).astype(int)
    columns = np.linspace(0, computed.shape[1], frame.shape[1], endpoint=False).astype(int)
    grey = 110 + 0.5 * frame.mean(axis=-1, keepdims=True).repeat(3, axis=-1)
    tinted = 0.4 * grey + 0.6 * np.array(COMPUTED_COLOUR)
    return np.where(computed[rows][:, columns, None], tinted, grey).astype(np.uint8)


def _describe(record: Record) -> str:
    share = 100 * record.tokens / record.tokens_total
    return f"step {record.step}\n{record.decision}\n{share:.0f} % computed"


def _write_title(figure: Figure, title: str) -> None:
    """The title in one line, as long a part of it as the figure is wide."""
    title = " ".join(title.split())
    place = {"x": 0.02, "y": 1 - 0.12 / figure.get_figheight(), "ha": "left", "va": "top"}
    text = figure.suptitle(title, **place, fontsize=11, parse_math=False)
    edge = 0.99 * figure.bbox.x1

    def end_of(count: int) -> float:
        text.set_text(title[:count].rstrip() + "…")
        return text.get_window_extent().x1

    if text.get_window_extent().x1 > edge:
        end_of(bisect_right(range(len(title)), edge, key=end_of) - 1)


def _row_label(figure: Figure, axes, left: float, text: str) -> None:
    box = axes.get_position()
    x = left - 0.08 / figure.get_figwidth()
    figure.text(x, (box.y0 + box.y1) / 2, text, fontsize=8.5, ha="right", va="center")


def _bare(axes) -> None:
    axes.set_xticks([])
    axes.set_yticks([])


def _times(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}×"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)
