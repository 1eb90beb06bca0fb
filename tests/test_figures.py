"""Figures from result files: what is drawn, and that files of another kind are refused."""

import json

import numpy as np
import pytest
import torch
from comparison_samples import write_samples
from PIL import Image

from benchmarks import figures, table
from benchmarks.plots import save
from benchmarks.weight_maps import weights_figure
from common.cache import Record, Trace
from common.cache.trace import StepMaps
from common.errors import UserError

SHARES = (0.6, 0.4, 0.3, 0.2)


@pytest.fixture
def results(tmp_path):
    """A result file of a comparison: three methods at four shares, presets, and the rounding floor."""
    kinds = {"flowcache-matched": 40, "flowcache-modulation": 37, "motioncache-matched": 38}
    methods = {f"{kind}@{share}": (share, psnr + 10 * share) for kind, psnr in kinds.items() for share in SHARES}
    presets = {"motioncache-slow": (0.45, 41), "motioncache-fast": (0.3, 39), "exact-bfloat16": (1, 52)}
    published = {f"flowcache-modulation@{share}": {"distance": "modulation"} for share in SHARES}
    write_samples(tmp_path / "out", {"exact": (1, 0), **presets, **methods}, **published)
    table.make_table([tmp_path / "out"], tmp_path / "table.json", "command")
    return tmp_path / "table.json"


@pytest.fixture
def ablated(tmp_path):
    """A result file of an ablation: three values of α, and FlowCache."""
    cache = {f"motioncache-alpha{a:g}@0.4": {"alpha": a} for a in (0.0, 0.5, 1.0)}
    methods = {"exact": (1, 0), "flowcache-matched@0.4": (0.4, 33), **dict.fromkeys(cache, (0.4, 30))}
    write_samples(tmp_path / "out", methods, **{"flowcache-matched@0.4": {"alpha": 1.0}}, **cache)
    table.make_table([tmp_path / "out"], tmp_path / "ablation-alpha.json", "command")
    return tmp_path / "ablation-alpha.json"


FOUND = {
    "model": "tiny",
    "published": "output motion",
    "steps": {
        name: {measure: [None, 0.5, 0.6, 0.7] for measure in ("ndcg", "spearman")}
        for name in ("output motion", "input change", "random")
    },
    "tokens": {"top": [0.5, 1.0], "early": [0.8, 1.0], "middle": [0.7, 1.0], "late": [0.6, 1.0]},
    "frames": {"change": [1.0, 2.0, 3.0], "motion": [0.1, 0.1, 0.1]},
}


def labels(axes):
    return axes.get_legend_handles_labels()[1]


def run(*arguments):
    return figures.main([str(argument) for argument in arguments])


def test_quality_draws_every_row_and_names_its_distance(results):
    axes = figures.quality(json.loads(results.read_text())).axes[0]
    assert labels(axes) == [
        "flowcache-matched, table",
        "flowcache-modulation, modulation",
        "motioncache-slow, table",
        "motioncache-fast, table",
        "motioncache-matched, table",
    ]
    curves = {c.get_label(): c.lines[0] for c in axes.containers}
    x, y = curves["flowcache-matched, table"].get_data()
    assert list(x) == sorted(SHARES)
    assert list(y) == pytest.approx([43.0, 44.0, 45.0, 47.0])
    assert curves["motioncache-slow, table"].get_linestyle() == "None", "a preset is a point"
    looks = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in curves.values()}
    assert len(looks) == len(curves), "no two curves look alike"
    assert [text.get_text() for text in axes.texts] == ["exact in bfloat16"]


def test_ablation_over_a_number(ablated):
    figure = figures.ablation(json.loads(ablated.read_text()), "alpha")
    above, below = figure.axes
    (curve,) = above.containers
    assert list(curve.lines[0].get_xdata()) == [0.0, 0.5, 1.0]
    assert list(curve.lines[0].get_ydata()) == [-3.0] * 3, "PSNR less FlowCache's"
    assert labels(above) == ["flowcache, same compute", "motioncache"]
    assert below.get_xlabel() == "alpha"


def test_chunk_phase_has_its_unit_and_whole_ticks(tmp_path):
    cache = {f"motioncache-k{k}@0.4": {"chunk_phase": k} for k in (0, 1, 2)}
    write_samples(tmp_path / "out", {"exact": (1, 0), **dict.fromkeys(cache, (0.4, 30))}, **cache)
    table.make_table([tmp_path / "out"], tmp_path / "t.json", "command")
    below = figures.ablation(json.loads((tmp_path / "t.json").read_text()), "chunk_phase").axes[1]
    assert below.get_xlabel() == "chunk phase, computed steps"
    assert all(tick == int(tick) for tick in below.get_xticks())


def test_ablation_side_by_side(ablated):
    below = figures.ablation(json.loads(ablated.read_text()), "method").axes[1]
    names = [text.get_text() for text in below.get_xticklabels()]
    assert names == [f"motioncache-alpha{a}@0.4" for a in ("0", "0.5", "1")]


def test_ablation_without_flowcache_at_the_same_compute_shows_psnr(tmp_path):
    cache = {f"flowcache-t{t}": {"threshold": t} for t in (0.1, 0.2)}
    write_samples(
        tmp_path / "out", {"exact": (1, 0), "flowcache-t0.1": (0.5, 32), "flowcache-t0.2": (0.3, 30)}, **cache
    )
    table.make_table([tmp_path / "out"], tmp_path / "t.json", "command")
    above = figures.ablation(json.loads((tmp_path / "t.json").read_text()), "threshold").axes[0]
    assert list(above.containers[0].lines[0].get_ydata()) == [33.0, 31.0]
    assert labels(above) == ["flowcache"]


def test_ablation_by_a_setting_that_does_not_vary(ablated):
    with pytest.raises(UserError, match="'chunk_phase' is not allowed; the methods of this file differ in alpha"):
        figures.ablation(json.loads(ablated.read_text()), "chunk_phase")


def test_fidelity_marks_the_published_score_and_skips_steps_without_values():
    ndcg, spearman = figures.fidelity(FOUND).axes
    assert labels(spearman) == ["output motion (published)", "input change", "random"]
    assert list(ndcg.lines[0].get_xdata()) == [1, 2, 3]


def test_distributions():
    tokens, frames = figures.distributions(FOUND).axes
    assert labels(tokens) == ["early steps", "middle steps", "late steps", "even"]
    assert list(frames.lines[0].get_ydata()) == [0.5, 1.0, 1.5], "relative to the mean of all frames"
    assert frames.get_ylim()[1] > 1.5, "the highest marker is not cut"


def test_commands_write_into_the_docs(ablated, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "FIGURES", tmp_path / "figures")
    assert run("ablation", ablated, "--by", "alpha") == 0
    with Image.open(tmp_path / "figures/ablation-alpha.png") as image:
        assert image.width > 500


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quality", "{other}"], "is of another kind, it has no rows and quoted"),
        (["fidelity", "{other}"], "is of another kind"),
        (["quality", "{tmp}/nowhere.json"], "cannot be read"),
        (["quality", "{overhead}"], "is of another kind"),
        (["qualty", "{other}"], "invalid choice: 'qualty'"),
        (["ablation", "{other}"], "the following arguments are required: --by"),
        (["ablation", "{other}", "--by", "alpha", "--outptu", "x.png"], "did you mean '--output'?"),
        (["weights", "--config", "{tmp}/nowhere.yaml"], "nowhere.yaml' cannot be read"),
    ],
)
def test_bad_input_is_one_line(arguments, message, tmp_path, capsys):
    other, overhead = tmp_path / "other.json", tmp_path / "overhead.json"
    other.write_text("{}")
    overhead.write_text(json.dumps({"rows": [{"model": "tiny", "share": 0.4, "time_ratio": 0.5}], "lines": {}}))
    assert run(*(word.format(other=other, overhead=overhead, tmp=tmp_path) for word in arguments)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def trace_with_maps(weights: list[torch.Tensor]) -> Trace:
    trace = Trace(keep_maps=True)
    for step, of_step in enumerate(weights):
        record = Record(0, step, 1, "cond", step, "denoise", "select", 8, of_step.numel(), 32)
        trace.maps.append(StepMaps(record, of_step, of_step > 0.5))
    return trace


def test_weight_maps_show_steps_that_weigh(tmp_path):
    equal, weighed = torch.ones(3, 2, 4), torch.linspace(0.6, 1, 24).view(3, 2, 4)
    trace = trace_with_maps([equal, equal, weighed, weighed])
    files = []
    for _ in range(2):
        figure = weights_figure(trace, 0, 1, np.zeros((3, 16, 32, 3)), "tiny")
        shown = [axes.get_ylabel() for axes in figure.axes if axes.get_ylabel().startswith("step")]
        assert shown == ["step 2", "step 3"]
        save(figure, tmp_path / "maps.png")
        files.append((tmp_path / "maps.png").read_bytes())
    assert files[0] == files[1], "the same figure gives the same file"


def test_weight_maps_without_weights():
    with pytest.raises(UserError, match="no step of this video weighed its tokens"):
        weights_figure(trace_with_maps([torch.ones(3, 2, 4)]), 0, 1, np.zeros((3, 16, 32, 3)), "tiny")
