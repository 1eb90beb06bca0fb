"""The counters of memory, kernels and waits, against what can be worked out by hand or measured on a CPU."""

import json
from pathlib import Path
from resource import RUSAGE_SELF, getrusage

import pytest
import torch
from diffusers import SkyReelsV2Transformer3DModel
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from benchmarks import memory
from benchmarks.speed.allocations import Allocations
from benchmarks.speed.fused import pretended
from benchmarks.speed.pretended import SMALL
from benchmarks.speed.skyreels import TRANSFORMER_TINY

META = torch.device("meta")
KIB = 2**10
REPOSITORY = Path(__file__).resolve().parents[1]


def tensor(kib, device=META):
    return torch.empty(kib * KIB, dtype=torch.uint8, device=device)


def test_bytes_are_counted_until_the_last_view_dies():
    with Allocations("meta") as counted:
        x = tensor(8)
        view = x[:16].view(4, 4)
        assert counted.live == 8 * KIB
        y = x + 1
        x += y
        assert counted.live == counted.peak.bytes == 16 * KIB
        del x
        assert counted.live == 16 * KIB  # its view is still there
        del view
        assert counted.live == 8 * KIB
        tensor(4, "cpu")
        assert counted.live == 8 * KIB
    assert counted.peak.bytes == 16 * KIB
    assert counted.largest() == {
        "aten.empty.memory_format uint8[8192]": 8 * KIB,
        "aten.add.Tensor uint8[8192]": 8 * KIB,
    }


def test_given_tensors_and_parts_belong_to_the_peak():
    given, held = tensor(32), {"kept": 0}
    part = given[:5]
    with Allocations("meta", lambda: dict(held)) as counted:
        assert counted.hold([given, part]) == 32 * KIB
        held["kept"] = 7
        x = tensor(1)
        held["kept"] = 9
        del x
        tensor(1)
    assert counted.peak.bytes == 33 * KIB and counted.peak.parts == {"kept": 7}
    assert counted.largest() == {"given uint8[32768]": 32 * KIB, "aten.empty.memory_format uint8[1024]": KIB}


def layers():
    return nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.LayerNorm(256), nn.Linear(256, 64), nn.Softmax(-1))


def counted_peak(kind, model, x):
    with Allocations(kind) as counted:
        held = counted.hold([x, *model.parameters()])
        model(x)
    return counted.peak.bytes - held


def profiled_peak(path, work):
    """Most bytes on the CPU above those at the beginning, from the allocator's own record."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    profiler.export_chrome_trace(str(path))
    events = [e for e in json.loads(path.read_text())["traceEvents"] if e["name"] == "[memory]"]
    changes = [e["args"]["Bytes"] for e in sorted(events, key=lambda e: e["ts"])]
    held, peak = 0, 0
    for change in changes:
        held += change
        peak = max(peak, held)
    return peak


@torch.no_grad()
def test_counted_peak_is_the_allocators(tmp_path):
    model, x = layers(), torch.randn(100, 64)
    model(x)
    real = counted_peak("cpu", model, x)
    assert real == pytest.approx(profiled_peak(tmp_path / "trace.json", lambda: model(x)), rel=0.01)
    assert counted_peak("meta", model.to(META), x.to(META)) == real


@torch.no_grad()
def test_counted_peak_of_the_librarys_forward_is_the_allocators(tmp_path):
    model = SkyReelsV2Transformer3DModel(**TRANSFORMER_TINY).eval()
    latents, text = torch.randn(1, 4, 6, 32, 48), torch.randn(1, 8, 16)
    steps = torch.full((1, 6), 500)

    def forward():
        model(latents, steps, text, enable_diffusion_forcing=True, fps=[1])

    forward()
    with Allocations("cpu") as counted:
        held = counted.hold([latents, steps, text, *model.parameters(), *model.buffers()])
        forward()
    # The allocator also sees what kernels make for themselves.
    assert counted.peak.bytes - held == pytest.approx(profiled_peak(tmp_path / "trace.json", forward), rel=0.03)


@torch.no_grad()
def test_attention_is_one_kernel_and_a_mask_becomes_numbers():
    q = torch.empty(1, 4, 1000, 32, dtype=torch.bfloat16, device=META)
    k = torch.empty(1, 4, 2000, 32, dtype=torch.bfloat16, device=META)
    mask = torch.empty(1000, 2000, dtype=torch.bool, device=META)
    with pretended() as gpu:
        gpu.hold([q, k, mask])
        before = gpu.live
        out = F.scaled_dot_product_attention(q, k, k)
        assert (gpu.kernels, out.shape, out.dtype) == (1, q.shape, q.dtype)
        assert gpu.peak.bytes - before == q.nbytes + 4 * 1000 * 4  # a float32 log-sum-exp for each head and query
        del out
        F.scaled_dot_product_attention(query=q, key=k, value=k, attn_mask=mask)
        assert gpu.kernels == 3 and gpu.peak.bytes - before == q.nbytes + 2 * mask.nbytes
    assert not gpu.waits


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_rms_norm_is_one_kernel():
    norm = nn.RMSNorm(64, device=META, dtype=torch.bfloat16)
    x = torch.empty(1, 1000, 64, device=META, dtype=torch.bfloat16)
    with pretended() as gpu:
        assert norm(x).dtype == x.dtype
        assert gpu.kernels == 1 and gpu.peak.bytes == x.nbytes + 1000 * 4
        norm.float()(x)
        assert gpu.kernels > 3  # dtypes that differ are worked out step by step, on a GPU too


@torch.no_grad()
def test_operations_that_return_what_they_were_given_make_nothing():
    linear = nn.Linear(
        64, 64, bias=False, device=META
    )  # of three axes: a product, and a view that is not said to be one
    x = torch.empty(1, 100, 64, device=META)
    with pretended() as gpu:
        held = gpu.hold([x, linear.weight])
        for times in range(1, 4):
            out = linear(x)
            assert (gpu.kernels, gpu.live - held) == (times, out.nbytes)
        torch.add(out, out, out=out)
        assert (gpu.kernels, gpu.live - held) == (4, out.nbytes)


MOVED = {
    "added": (3, lambda x, y, rows: x + y),
    "added in place": (3, lambda x, y, rows: x.add_(y)),
    "repeated by strides": (2, lambda x, y, rows: x * y[:1, :1].expand(100, 64)),
    "copied": (2, lambda x, y, rows: x.copy_(y)),
    "picked": (0.2, lambda x, y, rows: x.index_select(0, rows)),
    "put back": (0.2, lambda x, y, rows: x.index_copy_(0, rows, y[:10])),
    "multiplied": (0, lambda x, y, rows: x.T @ y),
    "viewed": (0, lambda x, y, rows: x.flatten()),
}


@pytest.mark.parametrize("name", MOVED)
def test_bytes_that_kernels_read_and_write(name):
    passes, work = MOVED[name]
    with pretended() as gpu, torch.no_grad():
        x, y = (torch.empty(100, 64, device=META) for _ in range(2))
        rows = torch.arange(10, device=META)
        before = gpu.moved
        work(x, y, rows)
        assert gpu.moved - before == pytest.approx(passes * x.nbytes, abs=4)


def test_dtypes_follow_from_the_kind_of_number():
    with pretended():
        x = torch.arange(3, device=META)
        assert ((x + 1).dtype, (x + 1.0).dtype, (x + True).dtype) == (torch.int64, torch.float32, torch.int64)


def test_pretended_tensors_say_that_they_are_on_a_gpu():
    with pretended():
        assert tensor(1).is_cuda and not tensor(1, "cpu").is_cuda
    assert not tensor(1).is_cuda


WAITS = {
    "item": (1, lambda x, host: x[0].item()),
    "bool": (1, lambda x, host: bool((x > 1).all())),
    "tolist": (1, lambda x, host: x.tolist()),
    "equal": (1, lambda x, host: torch.equal(x, x)),
    "nonzero": (1, lambda x, host: x.nonzero()),
    "boolean index": (1, lambda x, host: x[x > 1]),
    "to the GPU": (1, lambda x, host: host.to(META)),
    "to the host": (1, lambda x, host: x.cpu()),
    "copied in place": (1, lambda x, host: x.copy_(host)),
    "made from a list": (1, lambda x, host: torch.tensor([1, 2], device=META)),
    "index on the host": (1, lambda x, host: x[host.long()]),
    "solve": (1, lambda x, host: torch.linalg.solve(x.diag(), x)),
    "not waited for": (0, lambda x, host: host.to(META, non_blocking=True)),
    "filled": (0, lambda x, host: torch.full((3,), 2.0, device=META)),
    "number of the host": (0, lambda x, host: x * host.sum()),
    "sorted": (0, lambda x, host: x.topk(2).indices.sort().values),
    "assigned": (0, lambda x, host: x.__setitem__(torch.arange(2, device=META), 0.0)),
}


@pytest.mark.parametrize("name", WAITS)
def test_waits(name):
    waits, work = WAITS[name]
    with pretended() as gpu:
        x, host = torch.arange(1, 4, dtype=torch.float32, device=META), torch.tensor([0.0, 2.0, 1.0])
        work(x, host)
    assert gpu.waits.total() == waits


def test_values_of_the_host_can_be_followed():
    with pretended() as gpu:
        x = torch.tensor([3.0, 1.0, 2.0]).to(META)
        rows = x.view(1, 3).expand(2, 3).clone()
        rows[0, :2] = 7
        rows[:, 2].mul_(10)
        assert rows.tolist() == [[7, 7, 20], [3, 1, 20]]
        assert rows[rows > 7].tolist() == [20, 20]
        assert (x.argsort()[0].item(), len((x == 2).nonzero())) == (1, 1)
        x.add_(torch.empty(3, device=META).exponential_())
        with pytest.raises(RuntimeError, match="depend on what a GPU would have computed"):
            x.tolist()
    assert gpu.waits.total() == 7


def test_large_tensors_of_the_host_are_never_touched():
    rows, before = 2**31, getrusage(RUSAGE_SELF).ru_maxrss
    with pretended() as gpu:
        store = torch.zeros(rows, dtype=torch.uint8)
        store[:SMALL].copy_(torch.empty(SMALL, dtype=torch.uint8, device=META), non_blocking=True)
        assert gpu.copied == SMALL and not gpu.waits
        store.index_copy_(0, torch.arange(4), torch.ones(4, dtype=torch.uint8))
        assert gpu.kernels == 1  # the copy; what the host does is not the GPU's
        moved = store[: 2 * SMALL].to(META)
        assert gpu.copied == 3 * SMALL and gpu.waits.total() == 1 and gpu.live == 2 * SMALL
    del moved
    assert getrusage(RUSAGE_SELF).ru_maxrss - before < rows / KIB / 8  # kibibytes


def test_rows_of_the_table():
    subject, _ = memory.load("skyreels", "tiny", 1)
    plain = ["exact", "budget 0.25", "best"]
    names = plain + [f"{name}, kv_dtype int8" for name in plain[1:]] + [f"{name}, state_device cpu" for name in plain]
    found = memory.modes(subject, memory.CONFIGS["skyreels"])
    assert [mode.name for mode in found] == ["stock", *names]
    assert {mode.config.state_device for mode in found[-3:]} == {"cpu"}
    subject, _ = memory.load("magi", "tiny", 1)
    assert [mode.name for mode in memory.modes(subject, memory.CONFIGS["magi"])] == names


@pytest.mark.parametrize("model", list(memory.CONFIGS))
def test_one_command_counts_a_model(tmp_path, monkeypatch, documents, model):
    wanted = ["stock", "exact", "budget 0.25, state_device cpu"]
    every = memory.modes
    monkeypatch.setattr(memory, "modes", lambda *args: [mode for mode in every(*args) if mode.name in wanted])
    output = tmp_path / "new" / "memory.json"
    assert memory.main(["--models", model, "--size", "tiny", "--every", "8", "--output", str(output)]) == 0
    rows = {row["mode"]: row for row in json.loads(output.read_text())["rows"]}
    assert [*rows] == (wanted if model == "skyreels" else wanted[1:])
    for row in rows.values():
        parts = sum(row[f"{part}_bytes"] for part in ("weights", "kv", "values", "rest"))
        assert row["peak_bytes"] == parts and row["rest_bytes"] > 0
        assert row["kernels"] > 100 and row["weights_bytes"] == rows["exact"]["weights_bytes"]
    exact, cached = rows["exact"], rows[wanted[-1]]
    assert exact["values_bytes"] == cached["kv_bytes"] == 0 < cached["values_bytes"]
    assert cached["copied_bytes"] > exact["copied_bytes"] + exact["kv_bytes"] // 4
    table = documents.memory(json.loads(output.read_text())).splitlines()
    assert [line.split(" | ")[1] for line in table if line.startswith(f"| {exact['model']} ")] == [*rows]
    assert "Counted, not measured." in table


def test_kv_at_the_peak_is_that_of_the_window():
    subject, iterations = memory.load("skyreels", "tiny", 8)
    mode = memory.modes(subject, memory.CONFIGS["skyreels"])[1]
    row = memory.row(subject, mode, memory.count_session(subject, mode, iterations))
    config, tokens = subject.transformer.config, subject.plan()[-1].kv_tokens
    width = config.num_attention_heads * config.attention_head_dim
    assert row["kv_bytes"] == len(subject.branches) * config.num_layers * tokens * width * 2 * 2  # K and V in bfloat16
