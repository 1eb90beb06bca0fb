"""VBench up to the border of its package: files, commands, resuming and totals, with a stand-in for its command."""

import json
import subprocess
import sys

import pytest

from benchmarks import vbench
from benchmarks.samples import SampleFolder
from benchmarks.vbench_prompts import PROMPT_LIST
from benchmarks.vbench_totals import QUALITY, SEMANTIC, with_totals
from common.runs import REPOSITORY

PROMPTS = {"color": ["a red kite, oil painting", "a green cup"], "scene": ["alley (at night)"]}
INFO = [
    {"prompt_en": prompt, "dimension": ["scene", "background_consistency"] if name == "scene" else [name]}
    for name, prompts in PROMPTS.items()
    for prompt in prompts
]
# As strict as the original about names and paths; scores are numbers of videos that it found, over 10.
SCORER = """\
#!{python}
import argparse, json, pathlib, shlex, shutil, sys
assert shutil.which("python") == str(pathlib.Path(__file__).parent / "python"), "another environment's python"
parser = argparse.ArgumentParser()
parser.add_argument("command", choices=["evaluate"])
for name in ("ngpus", "dimension", "videos_path", "output_path", "full_json_dir"):
    parser.add_argument("--" + name, required=True)
args = parser.parse_args()
assert all(" " not in path for path in (args.videos_path, args.output_path, args.full_json_dir)), "unquoted path"
ending = next(pathlib.Path(args.videos_path).iterdir()).suffix
found = 0
for entry in json.load(open(args.full_json_dir)):
    if args.dimension in entry["dimension"]:
        for i in range(5):
            file = pathlib.Path(args.videos_path) / f"{{entry['prompt_en']}}-{{i}}{{ending}}"
            found += file.is_file() and file.stat().st_size > 0
if args.dimension in {broken!r}:
    print("Traceback: no weights\\n")
    sys.exit(0)
out = pathlib.Path(args.output_path)
out.mkdir()
(out / "results_1_full_info.json").write_text("[]")
(out / "results_1_eval_results.json").write_text(json.dumps({{args.dimension: [found / 10, []]}}))
with open({calls!r}, "a") as calls:
    calls.write(args.dimension + "\\n")
"""


@pytest.fixture
def folder(tmp_path):
    """Two methods' samples of all prompts, two of each, in a folder with a space in its name."""
    folder = SampleFolder(tmp_path / "out put")
    for method in ("exact", "motioncache"):
        for prompt in (*PROMPTS["color"], *PROMPTS["scene"]):
            for i in range(2):
                write_sample(folder, method, f"{prompt}-{i}", f"{method} {prompt} {i}")
    return folder


def write_sample(folder, method, stem, fingerprint):
    """A sample as far as VBench is concerned; its stand-in does not decode."""
    video = folder.file(method, stem, ".mp4")
    video.parent.mkdir(parents=True, exist_ok=True)
    video.write_bytes(b"video")
    summary = folder.file(method, stem, ".json")
    summary.write_text(json.dumps({"fingerprint": fingerprint, "files": {".mp4": 5}}))


@pytest.fixture
def score(folder, tmp_path):
    """The command: `score(*options, broken=())` gives its exit code and what the stand-in was called for."""
    (tmp_path / "info.json").write_text(json.dumps(INFO))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").symlink_to(sys.executable)
    calls = tmp_path / "calls.txt"

    def run(*options, broken=()):
        scorer = tmp_path / "bin/vbench"
        scorer.write_text(SCORER.format(python=sys.executable, broken=list(broken), calls=str(calls)))
        scorer.chmod(0o755)
        calls.write_text("")
        arguments = [str(folder.root), "--scorer", str(scorer), "--source", str(tmp_path / "info.json"), *options]
        return vbench.main(arguments), calls.read_text().split()

    return run


def results(folder):
    return json.loads((folder.root / "vbench.json").read_text())


def test_each_method_and_sampled_dimension_is_scored_once(folder, score):
    code, called = score()
    assert code == 0 and sorted(called) == sorted(2 * ["color", "scene", "background_consistency"])
    expected = {"scene": 20.0, "color": 40.0, "background_consistency": 20.0}
    missing = {"quality": None, "semantic": None, "total": None}
    assert results(folder) == {"exact": expected | missing, "motioncache": expected | missing}
    assert score() == (0, [])


def test_only_what_was_made_anew_is_scored_again(folder, score):
    score()
    write_sample(folder, "exact", "a green cup-1", "new")
    assert score() == (0, ["color"])
    assert score("--dimensions", "scene") == (0, [])
    assert set(results(folder)["exact"]) == {*("color", "scene", "background_consistency"), *with_totals({})}


def test_a_dimension_that_fails_leaves_the_others(folder, score, capsys):
    assert score(broken=["scene"])[0] == 1
    said = capsys.readouterr().out
    assert "not scored: exact, scene" in said and "no weights" in said and "4 of 6 scores" in said
    assert "scene" not in results(folder)["exact"] and results(folder)["exact"]["color"] == 40
    assert score() == (0, ["scene", "scene"])


def test_half_of_a_dimension_is_not_scored(folder, score, capsys):
    for i in range(2):
        folder.file("motioncache", f"a green cup-{i}", ".json").unlink()
    code, called = score()
    assert code == 1 and called.count("color") == 1
    assert "motioncache, color: 1 of its prompts have no video" in capsys.readouterr().out


def test_what_is_wrong_is_named(folder, score, tmp_path, capsys):
    assert score("--dimensions", "colour")[0] == 2
    assert "did you mean 'color'" in capsys.readouterr().err
    assert score("--dimensions", "human_action")[0] == 2
    assert "no videos of VBench's prompts" in capsys.readouterr().err
    assert vbench.main([str(folder.root), "--scorer", str(tmp_path / "none")]) == 2
    assert "bash scripts/score_vbench.sh" in capsys.readouterr().err


def test_totals_are_those_of_the_published_script():
    assert QUALITY.keys() | SEMANTIC.keys() == PROMPT_LIST.keys() and not QUALITY.keys() & SEMANTIC.keys()
    top = {name: scale.high for name, scale in (QUALITY | SEMANTIC).items()}
    assert with_totals(top)["total"] == pytest.approx(100)
    assert with_totals({name: scale.low for name, scale in (QUALITY | SEMANTIC).items()})["total"] == pytest.approx(0)
    # Half of the prompts' agreement is lost: a fifth of the total is the semantic score.
    half = with_totals(top | {name: (s.low + s.high) / 2 for name, s in SEMANTIC.items()})
    assert (half["quality"], half["semantic"]) == pytest.approx((100, 50)) and half["total"] == pytest.approx(90)
    still = with_totals(top | {"dynamic_degree": 0})
    assert still["quality"] == pytest.approx(100 * 6 / 6.5)
    assert with_totals({name: top[name] for name in QUALITY})["total"] is None


def test_totals_of_a_published_row():
    """VideoCrafter-2.0 on the leaderboard: all its scores, then quality, semantic and total, in percent."""
    quality = {"subject_consistency": 96.85, "background_consistency": 98.22, "temporal_flickering": 98.41}
    quality |= {
        "motion_smoothness": 97.73,
        "dynamic_degree": 42.5,
        "aesthetic_quality": 63.13,
        "imaging_quality": 67.22,
    }
    semantic = {"object_class": 92.55, "multiple_objects": 40.66, "human_action": 95.0, "color": 92.92}
    semantic |= {"spatial_relationship": 35.86, "scene": 55.29, "appearance_style": 25.13, "temporal_style": 25.84}
    semantic |= {"overall_consistency": 28.23}
    totals = with_totals({name: percent / 100 for name, percent in (quality | semantic).items()})
    found = [totals[name] for name in ("quality", "semantic", "total")]
    assert found == pytest.approx([82.20, 73.42, 80.44], abs=0.005)


def test_the_script_explains_itself():
    done = subprocess.run(["bash", REPOSITORY / "scripts/score_vbench.sh", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "OUT" in done.stdout
    done = subprocess.run(["bash", REPOSITORY / "scripts/score_vbench.sh"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
