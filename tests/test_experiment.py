"""Experiment files: what they mean, and what is said of wrong ones."""

import json

import pytest
import yaml

from benchmarks.experiment import Experiment
from benchmarks.vbench_prompts import OWN_PROMPTS, PROMPT_LIST
from common.errors import UserError
from common.runs import REPOSITORY
from training.procedural import prompts

GOOD = {
    "config": "configs/skyreels_v2_tiny_slow.yaml",
    "prompts": {"split": "reporting", "count": 3},
    "seed": 5,
    "methods": {
        "flowcache@0.4": {"preset": "flowcache-slow", "cache": {"threshold": 0.07}},
        "stock": {},
        "exact": None,
        "exact-bfloat16": {"preset": "exact", "dtype": "bfloat16"},
        "base": {},
    },
}
INFO = [
    {"prompt_en": "a blue vase", "dimension": ["color"]},
    {"prompt_en": "a cat runs", "dimension": ["subject_consistency", "dynamic_degree", "motion_smoothness"]},
    {"prompt_en": "a blue vase", "dimension": ["color"]},
    {"prompt_en": "alley", "dimension": ["scene", "background_consistency"]},
]


@pytest.fixture
def load(tmp_path):
    """Load an experiment that differs from the good one in some keys; None leaves a key out."""

    def load(**changes) -> Experiment:
        values = {key: value for key, value in {**GOOD, **changes}.items() if value is not None}
        path = tmp_path / "experiment.yaml"
        path.write_text(yaml.safe_dump(values, sort_keys=False))
        return Experiment.load(path)

    return load


def test_methods_are_the_base_settings_with_their_changes(load):
    experiment = load()
    assert list(experiment.methods) == ["exact", "flowcache@0.4", "stock", "exact-bfloat16", "base"]
    base = experiment.settings.cache
    of = experiment.methods
    assert of["base"].cache == base and of["base"].dtype is None
    assert of["flowcache@0.4"].cache == base.replace(alpha=1.0, threshold=0.07)
    assert of["flowcache@0.4"].preset == "flowcache-slow"
    assert of["stock"].cache is None
    assert of["exact"].cache == of["exact-bfloat16"].cache == base.replace(method="exact")
    assert of["exact-bfloat16"].dtype == "bfloat16"
    assert experiment.config == REPOSITORY / GOOD["config"]


def test_settings_can_differ_from_the_config(load):
    experiment = load(settings={"steps": 50, "guidance_scale": 2.0})
    assert (experiment.settings.steps, experiment.settings.guidance_scale) == (50, 2.0)
    assert experiment.changes == {"steps": 50, "guidance_scale": 2.0}
    assert load().changes == {} and load().settings.steps == 30
    assert experiment.methods == load().methods


def test_prompts_of_a_split_have_numbered_seeds_and_names(load):
    found = load().prompts
    assert [p.text for p in found] == prompts("reporting", 3)
    assert [(p.index, p.seed) for p in found] == [(0, 5), (1, 6), (2, 7)]
    assert len({p.stem for p in found}) == 3 and all(p.stem == p.stem.lower() and "/" not in p.stem for p in found)


def test_prompts_of_a_file(load, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a boat\n\n  a kite / a bird \na boat\n")
    found = load(prompts={"file": str(path)}).prompts
    assert [p.text for p in found] == ["a boat", "a kite / a bird", "a boat"]
    assert [p.stem for p in found] == ["0000-a-boat", "0001-a-kite-a-bird", "0002-a-boat"]
    assert [p.text for p in load(prompts={"file": str(path), "count": 1}).prompts] == ["a boat"]


def test_vbench_prompts_have_the_official_names_and_seeds_that_more_dimensions_leave_alone(load, tmp_path):
    source = tmp_path / "info.json"
    source.write_text(json.dumps(INFO))
    given = {"samples": 2, "source": str(source)}
    found = load(prompts={"vbench": ["color"], **given}).prompts
    assert [p.stem for p in found] == ["a blue vase-0", "a blue vase-1"]
    assert [p.seed for p in found] == [5, 6]
    more = load(prompts={"vbench": ["dynamic_degree", "color", "subject_consistency"], **given}).prompts
    assert [p.stem for p in more] == ["a cat runs-0", "a cat runs-1", "a blue vase-0", "a blue vase-1"]
    assert {p.stem: p.seed for p in found}.items() <= {p.stem: p.seed for p in more}.items()
    assert len({p.index for p in more}) == 4


def test_vbench_prompts_of_a_folder_can_be_rewritten(load, tmp_path):
    (tmp_path / "lists").mkdir()
    (tmp_path / "long").mkdir()
    for name in OWN_PROMPTS:
        (tmp_path / "lists" / f"{name}.txt").write_text(f"{name} one\n{name} two\n")
        (tmp_path / "long" / f"{name}_longer.txt").write_text(f"{name} one, at length\n{name} two, at length\n")
    given = {"source": str(tmp_path / "lists"), "longer": str(tmp_path / "long"), "samples": 1}
    found = load(prompts={"vbench": "all", **given}).prompts
    assert len(found) == 22
    assert (found[1].stem, found[1].text) == ("human_action two-0", "human_action two, at length")
    (tmp_path / "long" / "color_longer.txt").write_text("only one\n")
    with pytest.raises(UserError, match=r"color_longer.txt has 1 prompts and color 2"):
        load(prompts={"vbench": "all", **given})


def test_the_papers_eleven_dimensions_cover_all_sixteen():
    assert len(OWN_PROMPTS) == 11 and len(PROMPT_LIST) == 16
    assert set(PROMPT_LIST.values()) == set(OWN_PROMPTS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": "configs/nothing.yaml"}, "nothing.yaml.*cannot be read"),
        ({"config": None}, "needs 'config: ...'"),
        ({"promts": {}}, "unknown experiment setting 'promts'; did you mean 'prompts'"),
        ({"seed": -1}, "seed: -1 is outside"),
        ({"settings": ["steps"]}, "settings: .* is not allowed; give"),
        ({"settings": {"step": 50}}, "unknown setting 'step'; did you mean 'steps'"),
        ({"settings": {"steps": 0}}, "steps: 0 is outside"),
        ({"settings": {"cache.threshold": 1}}, "settings: cache.threshold is not allowed; the experiment's .* methods"),
        ({"settings": {"seed": 1}}, "settings: seed is not allowed"),
        ({"prompts": {"split": "reportin"}}, "split 'reportin' is unknown"),
        ({"prompts": {"split": "reporting", "count": 0}}, "count: 0 is outside"),
        ({"prompts": {"split": "reporting", "samples": 2}}, "unknown setting of prompts 'samples'"),
        ({"prompts": {"count": 2}}, "give one of"),
        ({"prompts": {"file": "/no/such/file"}}, "cannot be read"),
        ({"prompts": {"vbench": ["colour"], "source": "x"}}, "unknown VBench dimension 'colour'; did you mean 'color'"),
        ({"prompts": {"vbench": ["color"], "source": "/no/info.json"}}, "give VBench's"),
        ({"methods": {"base": {}}}, "add a line 'exact: {}'"),
        ({"methods": {"exact": {}, "a b": {}}}, "method name 'a b'"),
        ({"methods": {"exact": {}, "x": {"preset": "slo"}}}, "method 'x': unknown preset 'slo'; did you mean 'slow'"),
        ({"methods": {"exact": {}, "x": {"dtype": "int8"}}}, "method 'x': dtype 'int8'"),
        ({"methods": {"exact": {}, "x": {"cache": {"treshold": 1}}}}, "method 'x': unknown cache setting 'treshold'"),
        ({"methods": {"exact": {}, "x": {"cache": {"threshold": "big"}}}}, "method 'x': threshold: 'big'"),
        ({"methods": {"exact": {}, "x": {"threshold": 1}}}, "unknown setting of method 'x' 'threshold'"),
        ({"methods": {"exact": {}, "stock": {"preset": "slow"}}}, "takes no preset"),
        ({"config": "configs/magi1_tiny_slow.yaml"}, "no unmodified pipeline"),
    ],
)
def test_what_is_wrong_is_named(load, changes, message):
    with pytest.raises(UserError, match=message) as caught:
        load(**changes)
    assert "\n" not in str(caught.value)


def test_experiments_of_the_other_model(load):
    methods = {name: given for name, given in GOOD["methods"].items() if name != "stock"}
    experiment = load(config="configs/magi1_tiny_slow.yaml", methods=methods)
    assert experiment.methods["flowcache@0.4"].cache.reuse == "velocity"


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs/experiments").glob("*_tiny.yaml")), ids=lambda p: p.stem)
def test_shipped_experiments_load(path):
    experiment = Experiment.load(path)
    assert len(experiment.prompts) > 1 and len(experiment.methods) > 1
