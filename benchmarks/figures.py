"""The figures of docs/, each from a result file or, for weight maps, from one video.

    python -m benchmarks.figures quality results/table1-tiny.json
    python -m benchmarks.figures ablation results/ablation-alpha-tiny.json --by alpha
    python -m benchmarks.figures fidelity results/score-fidelity-skyreels-tiny.json
    python -m benchmarks.figures distributions results/score-fidelity-skyreels-tiny.json
    python -m benchmarks.figures long-video results/long-video-skyreels-tiny.json
    python -m benchmarks.figures weights --config configs/skyreels_v2_tiny_slow.yaml

Curves differ in marker and line as well as in colour, so that they can be told apart in print.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from benchmarks.histories import FIRST, GIVEN, OWN
from benchmarks.names import BASELINE, split_name
from benchmarks.plots import MARKS, PANE, SERIES, error_bars, new_figure, point, save, styled
from benchmarks.weight_maps import draw_weights
from common.cli import Parser, run_command, whole_number
from common.errors import UserError
from common.files import make_output_folder

ROOT = Path(__file__).resolve().parents[1]
FIGURES = ROOT / "docs/figures"
UNITS = {"updates": "computed steps", "steps": "all steps"}
"""What a chunk phase is counted in, in words."""
MARKERS = "so^Dxv*P"
COLUMNS, LEGEND_LINE = 3, 0.15
"""Of a legend below: columns, and the inches of a line."""
NAMES = 1.4
"""Inches that the names of methods take under their points."""


@styled()
def quality(data: dict[str, Any]) -> Figure:
    """PSNR against the share of exact's compute, a panel per model: all that has a threshold for it, and presets."""
    models = list(dict.fromkeys(row["model"] for row in data["rows"]))
    cached = [row for row in data["rows"] if row["psnr_db"] is not None and _family(row) in MARKS]
    styles = _styles(cached)
    figure, panels = new_figure(len(models))
    for axes, model in zip(panels, models, strict=True):
        rows = [row for row in cached if row["model"] == model]
        for label, style in styles.items():
            named = [point(row, "compute_share", "psnr_db") for row in rows if _curve(row) == label]
            if named:
                error_bars(axes, named, label, style)
        exact = [row for row in data["rows"] if (row["model"], row["method"]) == (model, "exact-bfloat16")]
        for floor in [row["psnr_db"] for row in exact]:
            axes.axhline(floor, color="0.4", linestyle=":")
            axes.annotate("exact in bfloat16", (0.02, floor), xycoords=("axes fraction", "data"), va="bottom")
        axes.margins(y=0.1)
        _label(axes, f"{model}, n = {rows[0]['n']}", "share of exact's FLOPs", "PSNR against exact, dB")
    _legend_below(figure, panels)
    return figure


def _family(row: dict[str, Any]) -> str:
    return row["method"].partition("-")[0]


def _curve(row: dict[str, Any]) -> str:
    """What a row is drawn as: its kind, and the distance that spaces its steps, if the file says."""
    return ", ".join([split_name(row["method"])[0], *filter(None, [row["settings"].get("distance")])])


def _styles(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """A style per curve: its method's colour, white marks unless the distance is a table, no line for presets."""
    styles = {}
    for family, base in MARKS.items():
        first = MARKERS.index(base["marker"])
        curves = {_curve(row): row for row in rows if _family(row) == family}
        for number, (label, row) in enumerate(curves.items()):
            signal = row["settings"].get("distance") in ("modulation", "input")
            styles[label] = {
                "color": base["color"],
                "marker": MARKERS[(first + number) % len(MARKERS)],
                "markerfacecolor": "white" if signal else base["color"],
                "linestyle": "none" if split_name(row["method"])[1] is None else "--" if signal else "-",
            }
    return styles


@styled()
def ablation(data: dict[str, Any], by: str) -> Figure:
    """What a setting does to PSNR, a panel per model, with the share of compute below.

    Where all methods compute the same share, the difference from FlowCache is drawn: paired per prompt, its interval is
    many times narrower than that of PSNR itself.

    Args:
        data: a table's result file.
        by: setting that the methods differ in, or `method` for all of them side by side.

    Raises:
        UserError: no method differs in it.
    """
    rows = [row for row in data["rows"] if row["psnr_db"] is not None]
    if by != "method":
        rows = [row for row in rows if by in row["settings"]]
        if not rows:
            known = sorted({name for row in data["rows"] for name in row["settings"]})
            raise UserError(f"--by {by!r} is not allowed; the methods of this file differ in {', '.join(known)}")
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, panels = new_figure(len(models), heights=(3, 1))
    for column, model in enumerate(models):
        above, below = panels[column], panels[len(models) + column]
        found = [row for row in rows if row["model"] == model and split_name(row["method"])[0] != BASELINE]
        paired = all(row["minus_flowcache"] for row in found)
        numeric = by != "method" and all(_is_number(row["settings"][by]) for row in found)
        places = [row["settings"][by] if numeric else number for number, row in enumerate(found)]
        for family, style in MARKS.items():
            own = [(x, row) for x, row in zip(places, found, strict=True) if row["method"].startswith(family)]
            if not own:
                continue
            style = style if numeric else {**style, "linestyle": "none"}
            values = [(row["minus_flowcache"] if paired else (row["psnr_db"], row["psnr_ci95"])) for _, row in own]
            error_bars(above, [(x, *value) for (x, _), value in zip(own, values, strict=True)], family, style)
            error_bars(below, [(x, row["compute_share"], None) for x, row in own], family, style)
        if paired:
            above.axhline(0, color=MARKS["flowcache"]["color"], label="flowcache, same compute")
        if not numeric:
            figure.set_figheight(PANE[1] + NAMES)
            below.set_xticks(range(len(found)), [row["method"] for row in found], rotation=60, ha="right")
        above.sharex(below)
        above.tick_params(labelbottom=False)
        quantity = "PSNR − FlowCache's, dB" if paired else "PSNR against exact, dB"
        _label(above, f"{model}, n = {found[0]['n']}", "", quantity)
        unit = UNITS.get(found[0]["settings"].get(f"{by}_unit"))
        name = f"{by.replace('_', ' ')}, {unit}" if unit else by.replace("_", " ")
        _label(below, "", name if numeric else "", "compute")
        if numeric and all(isinstance(x, int) for x in places):
            below.xaxis.set_major_locator(MaxNLocator(integer=True))
        below.set_ylim(0, 1.2 * max(row["compute_share"] for row in found))
    _legend_below(figure, panels[: len(models)])
    return figure


@styled()
def fidelity(data: dict[str, Any]) -> Figure:
    """Rank correlation and NDCG of each score with the true change of residuals, over steps (the paper's Figure 3)."""
    figure, panels = new_figure(2)
    for axes, (measure, label) in zip(panels, (("ndcg", "NDCG"), ("spearman", "Spearman correlation")), strict=True):
        for (score, found), style in zip(data["steps"].items(), SERIES, strict=False):
            points = [(k, value) for k, value in enumerate(found[measure]) if value is not None]
            published = " (published)" if score == data["published"] else ""
            axes.plot(*zip(*points, strict=True), label=score + published, markevery=4, **style)
        _label(axes, data["model"], "denoising step", label)
    _legend_below(figure, panels[:1])
    return figure


@styled()
def distributions(data: dict[str, Any]) -> Figure:
    """How change is spread over tokens, and change and motion of each latent frame (the paper's Figure 2)."""
    figure, (over_tokens, over_frames) = new_figure(2)
    top = [0.0, *data["tokens"]["top"]]
    for part, style in zip(("early", "middle", "late"), SERIES, strict=False):
        over_tokens.plot(top, [0.0, *data["tokens"][part]], label=f"{part} steps", markevery=4, **style)
    over_tokens.plot([0, 1], [0, 1], color="0.4", linestyle=":", label="even")
    over_tokens.legend()
    _label(over_tokens, data["model"], "share of tokens, most changing first", "share of squared change")
    names = {"change": "change of residual", "motion": f"{data['published']} (published score)"}
    highest = 0.0
    for (name, label), style in zip(names.items(), SERIES, strict=False):
        values = data["frames"][name]
        mean = sum(values) / len(values)
        over_frames.plot([value / mean for value in values], label=label, **style)
        highest = max(highest, max(values) / mean)
    over_frames.set_ylim(0, 1.1 * highest)
    over_frames.legend()
    _label(over_frames, data["model"], "latent frame", "mean over tokens and steps / mean of all")
    return figure


@styled()
def long_video(data: dict[str, Any]) -> Figure:
    """PSNR and computed tokens of each chunk of a long video, from its own history and given exact's."""
    figure, (own, given, tokens) = new_figure(3)
    for row in data["rows"]:
        style, label = MARKS[row["method"].partition("-")[0]], row["method"]
        if row["history"] == FIRST:
            style, label = SERIES[-1], f"{label} in the first window, then exact"
        halves = row["psnr_ci95"] or [None] * data["chunks"]
        places = range(1, data["chunks"] + 1)
        axes = given if row["history"] == GIVEN else own
        error_bars(axes, zip(places, row["psnr_db"], halves, strict=True), label, style)
        if row["history"] == OWN:
            tokens.plot(places, row["token_share"], label=label, **style)
    n = data["rows"][0]["n"]
    for axes, history in ((own, "from its own history"), (given, "given exact's history")):
        _label(axes, f"{data['model']}, {history}, n = {n}", "chunk", "PSNR against exact, dB")
    given.sharey(own)
    _label(tokens, "from its own history", "chunk", "share of the tokens computed")
    tokens.set_ylim(0, 1)
    _legend_below(figure, [own])
    return figure


def _legend_below(figure: Figure, panels: Sequence[Axes]) -> None:
    """One legend for panels whose curves may differ, where it covers none of them."""
    handles = {
        label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.set_figheight(figure.get_figheight() + LEGEND_LINE * -(-len(handles) // COLUMNS))
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=COLUMNS)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _label(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)


def _load(path: Path, keys: Sequence[str]) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"result file {str(path)!r} cannot be read ({error}); give a file of results/") from error
    if not isinstance(data, dict) or not set(keys) <= set(data):
        raise UserError(
            f"result file {str(path)!r} is of another kind, it has no {' and '.join(keys)}; give another one"
        )
    return data


OF_TABLES = ("rows", "quoted")
OF_FIDELITY = ("steps", "tokens", "frames", "model", "published")
DRAWN: dict[str, tuple[Sequence[str], Callable[..., Figure]]] = {
    "quality": (OF_TABLES, quality),
    "ablation": (OF_TABLES, ablation),
    "fidelity": (OF_FIDELITY, fidelity),
    "distributions": (OF_FIDELITY, distributions),
    "long-video": (("rows", "model", "chunks"), long_video),
}
"""What each figure that is drawn from a file needs of it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(lambda: _run(_parser().parse_args(argv)))


def _run(args: argparse.Namespace) -> None:
    if args.name == "weights":
        source, draw = args.config, partial(draw_weights, args.config, args.prompt, args.seed)
    else:
        source = args.results
        keys, function = DRAWN[args.name]
        options = (args.by,) if args.name == "ablation" else ()
        draw = partial(function, _load(source, keys), *options)
    output = args.output or FIGURES / f"{args.name}-{source.stem.removeprefix(f'{args.name}-')}.png"
    make_output_folder(output.parent)
    save(draw(), output)


def _parser() -> Parser:
    parser = Parser.of_module("benchmarks.figures", __doc__)
    names = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    for name, (_, draw) in DRAWN.items():
        sub = _subparser(names, name, draw)
        sub.add_argument("results", type=Path, metavar="FILE.json", help="result file")
        if name == "ablation":
            sub.add_argument(
                "--by",
                required=True,
                metavar="SETTING",
                help="cache setting along the axis, such as alpha, or 'method'",
            )
    sub = _subparser(names, "weights", draw_weights)
    sub.add_argument("--config", type=Path, required=True, metavar="FILE", help="YAML file of either model")
    sub.add_argument("--seed", type=whole_number, metavar="N", help="seed of the noise (the config's)")
    sub.add_argument("--prompt", metavar="TEXT", help="what the video shows (the config's)")
    for sub in names.choices.values():
        sub.add_argument(
            "--output",
            type=Path,
            metavar="NAME.png",
            help="file to write (docs/figures/<figure>-<name of the file>.png)",
        )
    return parser


def _subparser(names: argparse._SubParsersAction, name: str, draw: Callable[..., Figure]) -> Parser:
    """A figure's own options, with the first line of what draws it as its description."""
    line = draw.__doc__.partition("\n")[0]
    return names.add_parser(name, help=line, description=line)


if __name__ == "__main__":
    sys.exit(main())
