"""`compile: true` in a run of either model: what is compiled, what it is not combined with, and what it needs."""

import shutil
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
from command_cases import assert_one_line, runner, summary_of
from diffusers.models.modeling_utils import ModelMixin
from torch._inductor.utils import fresh_cache

from benchmarks.subject import SkyReelsSubject
from common import job
from common.compiling import GRAPHS, check_compiler, room_for_graphs
from common.errors import UserError
from common.video import read_video
from magi1_motioncache.cli import main as magi
from skyreels_v2_motioncache.cli import main as skyreels
from skyreels_v2_motioncache.settings import RunSettings

COMPILED = ["--set", "compile=true", "--device", "cpu"]
SKYREELS = ["--height", "32", "--width", "32", "--num-frames", "21", "--steps", "4", "--prompt", "a red circle"]
SKYREELS += ["--set", "cache.warmup_steps=1", "--set", "cache.chunk_phase=0", "--set", "cache.distance=input"]
SKYREELS += ["--set", "cache.threshold=0.05", "--set", "cache.min_update_share=0"]
MAGI = ["--height", "32", "--width", "32", "--num-frames", "16", "--steps", "4", "--prompt", "a red circle"]
MAGI += ["--set", "cache.warmup_steps=1", "--set", "cache.chunk_phase=0", "--set", "cache.threshold=0.1"]


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that blocks are compiled to; they run as they are, and no compiler is needed."""
    seen = []

    def backend(graph, inputs):
        seen.append(graph)
        return graph.forward

    stock = ModelMixin.compile_repeated_blocks
    monkeypatch.setattr(
        ModelMixin, "compile_repeated_blocks", lambda self, **options: stock(self, backend=backend, **options)
    )
    monkeypatch.setattr(job, "check_compiler", lambda device: None)
    torch._dynamo.reset()
    yield seen
    torch._dynamo.reset()


@pytest.fixture(params=["skyreels", "magi"])
def run(request, tmp_path_factory):
    """The command of a model, in this process."""
    main, small, folder = {
        "skyreels": (skyreels, SKYREELS, "tiny_pipeline_folder"),
        "magi": (magi, MAGI, "magi_folder"),
    }[request.param]
    return runner(main, request.getfixturevalue(folder), small, tmp_path_factory)


def test_all_stages_are_compiled_and_make_the_same_videos(run, graphs, capsys):
    plain, code = run()
    assert code == 0 and not graphs
    assert "compil" not in capsys.readouterr().out
    folder, code = run(*COMPILED)
    printed = " ".join(capsys.readouterr().out.split())
    assert code == 0 and 0 < len(graphs) < GRAPHS
    assert "blocks are compiled, in every stage" in printed and "includes compiling blocks" in printed
    summary = summary_of(folder)
    assert summary["config"]["compile"] is True
    assert summary["tokens_computed"] == summary_of(plain)["tokens_computed"] < summary["tokens_total"]
    for file in ("exact.mp4", "video.mp4"):
        difference = read_video(folder / file).astype(int) - read_video(plain / file)
        assert np.abs(difference).max() <= 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compile": 1}, "compile: 1 is not allowed; give true or false"),
        ({"complie": True}, "unknown setting 'complie'; did you mean 'compile'?"),
        (
            {"offload": "group"},
            "compile: true is not combined with offload: 'group', which moves weights between blocks; "
            "use --set compile=false or offload=none",
        ),
    ],
)
def test_what_it_is_not_combined_with(changes, message):
    with pytest.raises(UserError) as error:
        RunSettings.from_dict({"model": "m", "prompt": "p", "compile": True, **changes})
    assert message in str(error.value)


def test_it_is_combined_with_offloading_whole_parts():
    assert RunSettings("m", "p", compile=True, offload="model").compile
    assert not RunSettings("m", "p", offload="group").compile


def test_benchmarks_do_not_compile():
    with pytest.raises(UserError, match="compile: true is not for benchmarks.*; use compile=false"):
        SkyReelsSubject(RunSettings("m", "p", compile=True, device="cpu"))


def test_a_missing_compiler_is_one_line_before_anything_is_loaded(run, capsys):
    torch._dynamo.reset()
    with torch._inductor.config.patch({"cpp.cxx": ("/nowhere/g++",)}), fresh_cache():
        assert_one_line(run, capsys, COMPILED, "use --set compile=false")


HEADERS = Path(sysconfig.get_paths()["include"]) / "Python.h"


@pytest.mark.skipif(not (shutil.which("g++") and HEADERS.is_file()), reason="there is no compiler here")
def test_a_compiler_that_is_there_passes():
    torch._dynamo.reset()
    check_compiler(torch.device("cpu"))


def test_the_limit_of_graphs_is_the_runs_own():
    before = torch._dynamo.config.recompile_limit
    with room_for_graphs():
        assert torch._dynamo.config.recompile_limit == GRAPHS
    assert torch._dynamo.config.recompile_limit == before < GRAPHS
