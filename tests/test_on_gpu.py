"""Both commands on a CUDA device that is imitated: what they do there, and that it is what they do on a CPU."""

import json

import pytest
import torch
from command_cases import runner, summary_of
from imitated_gpu import imitated_gpu
from skyreels_random import TEXT_TOKENS, random_pipeline
from torch.nn.functional import linear

from common import metrics
from common.attention import without_cudnn
from common.cache import KVCache, MotionCacheConfig, Staging, Trace, Write
from common.errors import UserError
from common.offloading import offload_layers
from common.video import read_video
from magi1_motioncache import cli as magi_cli
from skyreels_v2_motioncache import apply_motioncache
from skyreels_v2_motioncache import cli as skyreels_cli

SIZES = {
    "skyreels": ["--height", "32", "--width", "32", "--num-frames", "21", "--steps", "8"],
    "magi": ["--height", "32", "--width", "32", "--num-frames", "24", "--steps", "8"],
}
EARLY = ["cache.warmup_steps=2", "cache.chunk_phase=0", "cache.distance=input"]
CASES = {
    "all on the GPU": ([], [*EARLY, "cache.budget=0.4", "cache.kv_budget=1"]),
    "parts in main memory": (
        ["--offload", "model"],
        [*EARLY, "cache.threshold=0.05", "cache.min_update_share=0", "cache.state_device=cpu"],
    ),
    "layers in main memory": (["--offload", "group", "--no-compare", "--preset", "best"], ["cache.threshold=0.5"]),
    "K/V in 8 bits": (["--no-compare"], [*EARLY, "cache.budget=0.4", "cache.kv_dtype=int8"]),
    "K/V in 8 bits, in main memory": (
        ["--no-compare"],
        [*EARLY, "cache.budget=0.4", "cache.kv_dtype=int8", "cache.state_device=cpu"],
    ),
}


@pytest.fixture(params=SIZES)
def model(request):
    return request.param


@pytest.fixture
def run(model, tiny_pipeline_folder, magi_folder, tmp_path_factory):
    """The model's command on a random checkpoint."""
    cli, folder = {"skyreels": (skyreels_cli, tiny_pipeline_folder), "magi": (magi_cli, magi_folder)}[model]
    small = [*SIZES[model], "--prompt", "a red circle", "--dtype", "float32"]
    return runner(cli.main, folder, small, tmp_path_factory)


def options(case):
    given, settings = CASES[case]
    return [*given, *(part for setting in settings for part in ("--set", setting))]


def rows(folder):
    """What was decided and computed."""
    trace = Trace.from_dict(json.loads((folder / "trace.json").read_text()))
    return [{**vars(record), "seconds": None} for record in trace.records]


@pytest.mark.parametrize("case", CASES)
def test_a_gpu_makes_the_same_video(run, case):
    with imitated_gpu():
        there, code = run("--device", "cuda", *options(case))
    assert code == 0 and summary_of(there)["device_name"] == "imitated GPU"
    on_cpu = [part for part in options(case) if part not in ("--offload", "model", "group")]
    here, code = run("--device", "cpu", *on_cpu)
    assert code == 0
    assert rows(there) == rows(here)
    decisions = {row["decision"] for row in rows(here)}
    assert decisions >= ({"full", "reuse"} if "best" in options(case) else {"full", "select"})
    # A CPU decodes SkyReels-V2's videos through other convolutions, and encoding makes more of a rounding.
    frames = [read_video(folder / "video.mp4") / 255 for folder in (there, here)]
    assert metrics.psnr(*frames) > 45


@pytest.mark.parametrize("how", ["model", "group"])
def test_offloading_of_the_users_own(how):
    config = MotionCacheConfig(warmup_steps=1, chunk_phase=1, distance="input", budget=0.5)
    pipe, call = random_pipeline()
    handle = apply_motioncache(pipe, config)
    prompts = {name: torch.randn(1, TEXT_TOKENS, 16) for name in ("prompt_embeds", "negative_prompt_embeds")}
    expected, records = call(**prompts), handle.trace.totals()
    with imitated_gpu():
        prompts = {name: prompt.to("cuda") for name, prompt in prompts.items()}
        pipe, call = random_pipeline()
        if how == "model":
            pipe.enable_model_cpu_offload(device="cuda")
        else:
            pipe.enable_group_offload(onload_device="cuda", offload_type="leaf_level", use_stream=True)
        handle = apply_motioncache(pipe, config)
        for _ in range(2):  # offloading is renewed after a call
            assert torch.equal(call(**prompts).cpu(), expected)
            assert handle.trace.totals() == records


def test_a_layer_waits_for_its_weights():
    model = torch.nn.ModuleDict({"first": torch.nn.Linear(4, 4), "layers": torch.nn.ModuleList()})
    model["layers"].extend(torch.nn.Linear(4, 4) for _ in range(3))
    x = torch.randn(2, 4)
    expected = x
    for layer in (model["first"], *model["layers"]):
        expected = layer(expected)
    with imitated_gpu(), torch.no_grad():
        offload_layers(model, model["layers"], torch.device("cuda"))
        for _ in range(2):
            out = model["first"](x.to("cuda"))
            for layer in model["layers"]:
                assert layer.weight.device.type == "cpu" or layer is not model["layers"][0]
                out = layer(out)
            assert torch.equal(out.cpu(), expected)


def test_too_little_main_memory_is_told(monkeypatch):
    def refuse(*size, **options):
        raise torch.AcceleratorError("CUDA error: out of memory")

    with imitated_gpu():
        cache = KVCache(1, 1, 4, staging=Staging(torch.device("cuda")))
        rows = torch.ones(1, 2, 1, 4, device="cuda")
        layers = cache.open(Write(0, 2), rows)
        next(layers).update(rows, rows, Write(0, 2))
        monkeypatch.setattr(torch, "empty", refuse)
        with pytest.raises(UserError, match="main memory does not suffice .*out of memory.*state_device: model"):
            list(layers)


def test_the_kernel_of_new_shapes_is_not_cudnns():
    enabled = torch.backends.cuda.cudnn_sdp_enabled()
    with without_cudnn():
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.cudnn_sdp_enabled() == enabled


def test_what_a_gpu_refuses():
    with imitated_gpu():
        there, here = torch.ones(2, 2, device="cuda"), torch.ones(2, 2)
        assert there.is_cuda and there.device == torch.device("cuda:0")
        for mixed in (
            lambda: there + here,
            lambda: linear(here, there),
            lambda: there.index_select(0, torch.tensor(0)),
        ):
            with pytest.raises(RuntimeError, match="at one place"):
                mixed()
        with pytest.raises(RuntimeError, match="indices"):
            here[torch.zeros(1, dtype=torch.long, device="cuda")]
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
        late = there.to("cpu", non_blocking=True)
        assert late.isnan().all()
        torch.cuda.synchronize()
        assert torch.equal(late, here)
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            early = here.to("cuda", non_blocking=True)
        assert early.sum().isnan()
        torch.cuda.current_stream().wait_stream(side)
        assert early.sum().item() == 4
        here.to("cuda", non_blocking=True)
        here.zero_()
        with pytest.raises(AssertionError, match="a copy was reading"):
            torch.cuda.synchronize()
