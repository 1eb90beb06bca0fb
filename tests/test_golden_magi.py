"""MAGI-1 against reference numbers of the original code: every case file in `MAGI_GOLDEN_DIR` (or the copy here)."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from common.cache import Write
from common.precision import to_mixed_precision
from magi1_motioncache import attention
from magi1_motioncache.caption_cleaning import clean_caption
from magi1_motioncache.captions import ChunkCaptions
from magi1_motioncache.config import SHORTCUT_MODES
from magi1_motioncache.denoiser import ExactDenoiser
from magi1_motioncache.plan import ChunkCall, Pass, Role
from magi1_motioncache.sampler import Magi1Sampler
from magi1_motioncache.schedule import stages, step_intervals, timesteps
from magi1_motioncache.special_tokens import SpecialTokens
from magi1_motioncache.vae import AutoencoderViTMagi1
from magi1_motioncache.vae_tiling import Tiling
from tests.magi_cases import Case, cases, parameters, relative_error, tensors, token_options

BF16_TOLERANCE = 7e-3
VAE_TOLERANCE = 1e-5
PASSES = (Pass.TEXT, Pass.NULL, Pass.UNCOND)


def half_precision(name: str) -> bool:
    return parameters(name)["config"]["model_config"]["params_dtype"] == "torch.bfloat16"


HALF_PRECISION = [name for name in cases("step") if half_precision(name)]


@dataclass
class RecordedCaptions:
    """The captions that a recorded step was given, per pass and place in the call."""

    by_call: dict[tuple[Pass, Role, int], Tensor]

    def tokens(self, call: ChunkCall) -> Tensor:
        return self.by_call[call.branch, call.role, call.chunk]


class RecordedStep:
    """One recorded iteration, its tensors found by the forwards that the plan names."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.width = case.sampling.chunk_width
        self.calls = list(case.plan.iterations())[case.parameters["cur_denoise_step"]]
        self.place = {}
        for index, branch in enumerate(PASSES):
            of_pass = [call for call in self.calls if call.branch is branch]
            self.place.update({(c.branch, c.role, c.chunk): (index, row) for row, c in enumerate(of_pass)})

    def frames(self, call: ChunkCall, name: str) -> Tensor:
        index, row = self.place[call.branch, call.role, call.chunk]
        recorded = self.case.tensors[f"call{index}.{name}"]
        if call.branch is Pass.UNCOND:
            return recorded[row : row + 1]
        return recorded[:, :, row * self.width : (row + 1) * self.width]

    def row(self, call: ChunkCall, name: str) -> Tensor:
        index, row = self.place[call.branch, call.role, call.chunk]
        recorded = self.case.tensors[f"call{index}.{name}"]
        return recorded.flatten()[row] if name == "t" else recorded[row]

    def captions(self) -> RecordedCaptions:
        found = {}
        for call in self.calls:
            mask = self.row(call, "xattn_mask_first64")[0].bool()
            found[call.branch, call.role, call.chunk] = self.row(call, "y_first64")[0, mask].float().unsqueeze(0)
        return RecordedCaptions(found)

    def denoiser(self) -> ExactDenoiser:
        model = self.case.transformer
        if half_precision(self.case.name):
            model = to_mixed_precision(copy.deepcopy(model), torch.bfloat16)
        denoiser = ExactDenoiser(model, self.captions(), self.case.plan)
        plan, size = self.case.plan, self.case.chunk_tokens
        history = denoiser.caches[plan.keeping_pass.value] = denoiser.new_cache(plan.num_chunks * size)
        before = self.case.tensors.get("kv_cache_before.layer0", torch.zeros(0))
        for start in range(0, len(before), size):
            write = Write(start, size)
            like = before[None].to(model.compute_dtype)
            for number, layer in enumerate(history.open(write, like)):
                rows = self.case.tensors[f"kv_cache_before.layer{number}"][None, start : start + size]
                layer.update(*rows.chunk(2, dim=-1), write)
        return denoiser

    @property
    def tolerance(self) -> float:
        return BF16_TOLERANCE if half_precision(self.case.name) else self.case.tolerance


def test_golden_every_case_file_is_tested():
    names = cases("unknown")
    assert not names, f"no test knows what to do with {names}"
    assert sum(len(cases(k)) for k in ("step", "run", "schedule", "tokens", "vae", "cleaning")) > 0


@pytest.mark.parametrize("name", cases("step"))
def test_golden_step_plan(name):
    step = RecordedStep(Case(name))
    recorded = step.case.parameters["calls"]
    for index, branch in enumerate(PASSES[: len(recorded)]):
        calls = [call for call in step.calls if call.branch is branch]
        kwargs = recorded[index]["kwargs"]
        batch = len(calls) if branch is Pass.UNCOND else 1
        copied = any(call.role is Role.NEAR for call in calls)
        assert len(calls) == kwargs["denoising_range_num"] * batch
        if branch is not Pass.UNCOND:
            assert calls[0].own_from == kwargs["slice_point"]
            assert any(call.role is Role.CLEAN for call in calls) == kwargs["fwd_extra_1st_chunk"]
        if step.case.sampling.cfg_number == 1:
            assert copied == kwargs["distill_nearly_clean_chunk"]
        for number, call in enumerate(calls):
            assert call.t == step.row(call, "t").item()
            row = number if branch is Pass.UNCOND else 0
            expected = [(call.kv_start + row) * step.case.chunk_tokens, (call.kv_end + row) * step.case.chunk_tokens]
            assert step.row(call, "kv_range").tolist() == expected


@pytest.mark.parametrize("name", cases("step"))
def test_golden_step_velocity_of_every_forward(name):
    step = RecordedStep(Case(name))
    denoiser = step.denoiser()
    for call in step.calls:
        velocity = denoiser.predict(call, step.frames(call, "x"))
        error = relative_error(velocity, step.frames(call, "out"))
        assert error < step.tolerance, (call.branch, call.role, call.chunk, error)


@pytest.mark.parametrize("name", HALF_PRECISION)
def test_golden_half_precision_to_the_last_bit(name, monkeypatch):
    """With the reference's own attention (probabilities rounded to bf16) nothing else may round differently."""

    def rounded_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        groups = query.shape[2] // key.shape[2]
        heads = (query, *(part.repeat_interleave(groups, dim=2) for part in (key, value)))
        q, k, v = (part.transpose(1, 2).float() for part in heads)
        share = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
        return (share.to(query.dtype).float() @ v).transpose(1, 2).to(query.dtype).flatten(2)

    monkeypatch.setattr(attention, "grouped_attention", rounded_attention)
    step = RecordedStep(Case(name))
    denoiser = step.denoiser()
    for call in step.calls:
        velocity = denoiser.predict(call, step.frames(call, "x"))
        assert relative_error(velocity, step.frames(call, "out")) < step.case.tolerance


@pytest.mark.parametrize("name", cases("step"))
def test_golden_step_guided_velocity(name):
    step = RecordedStep(Case(name))
    plan = step.case.plan
    sampler = Magi1Sampler(
        plan, torch.zeros(1, step.frames(step.calls[0], "x").shape[1], plan.latent_frames, *_size(step))
    )
    for call in step.calls:
        start = call.chunk * step.width
        sampler.latents[:, :, start : start + step.width] = step.frames(call, "x")
    velocities = sampler.velocities(step.denoiser(), step.calls)
    guided = torch.cat([velocities[chunk] for chunk in sorted(velocities)], dim=2)
    assert relative_error(guided, step.case.tensors["velocity"][:, :, -guided.shape[2] :]) < step.tolerance


@pytest.mark.parametrize("name", [n for n in cases("step") if any(k.startswith("kv_cache_after") for k in tensors(n))])
def test_golden_step_keys_and_values(name):
    step = RecordedStep(Case(name))
    denoiser = step.denoiser()
    for call in step.calls:
        denoiser.predict(call, step.frames(call, "x"))
    history = denoiser.caches[step.case.plan.keeping_pass.value]
    recorded = {key: rows for key, rows in step.case.tensors.items() if key.startswith("kv_cache_after.layer")}
    for number, layer in enumerate(history.look(0, len(recorded["kv_cache_after.layer0"]))):
        rows = recorded.pop(f"kv_cache_after.layer{number}", None)  # some cases have but the first layer's
        if rows is not None:
            assert relative_error(torch.cat(layer.read(0, len(rows)), dim=-1)[0], rows) < step.tolerance
    assert not recorded


@pytest.mark.parametrize("name", [n for n in cases("step") if any(".act." in key for key in tensors(n))])
def test_golden_step_activations(name, monkeypatch):
    step = RecordedStep(Case(name))
    denoiser = step.denoiser()
    model = denoiser.transformer
    layers = model.videodit_blocks.layers
    watched = {
        "final_layernorm": model.videodit_blocks.final_layernorm,
        "final_linear": model.final_linear.linear,
        "rope": model.rope,
        "y_adaln": model.y_embedder.y_proj_adaln[0],
        "y_xattn_flat": model.y_embedder.y_proj_xattn,
    }
    for index, layer in enumerate(layers):
        watched[f"layer{index}.out"] = layer
        watched[f"layer{index}.ada_raw"] = layer.ada_modulate_layer.proj[0]
        watched[f"layer{index}.linear_proj"] = layer.self_attention
    seen: dict[str, list[Tensor]] = {}
    joined: list[tuple[Tensor, Tensor]] = []
    interleave, condition = attention.interleave, model.condition

    def watch(key: str, value: Tensor) -> Tensor:
        seen.setdefault(key, []).append(value)
        return value

    monkeypatch.setattr(attention, "interleave", lambda *pair: joined.append(pair) or interleave(*pair))
    monkeypatch.setitem(model.__dict__, "condition", lambda *args: watch("condition", condition(*args)))
    hooks = [m.register_forward_hook(lambda _, __, out, key=key: watch(key, out)) for key, m in watched.items()]
    for call in step.calls:
        if call.branch is Pass.TEXT:
            denoiser.predict(call, step.frames(call, "x"))
    for hook in hooks:
        hook.remove()
    for index in range(len(layers)):
        of_layer = joined[index :: len(layers)]
        seen[f"layer{index}.core_attn_out"], seen[f"layer{index}.cross_attn_out"] = map(
            list, zip(*of_layer, strict=True)
        )
    recorded = {
        key.removeprefix("call0.act."): value for key, value in step.case.tensors.items() if "call0.act." in key
    }
    for key in recorded.keys() & seen.keys():
        values = torch.cat([value.flatten() for value in seen[key]])[: recorded[key].numel()]
        # Inside, the error is a share of smaller values than at the end.
        assert relative_error(values, recorded[key].flatten()) < 2 * step.tolerance, key
    assert recorded.keys() - seen.keys() <= {"condition_map"}


@pytest.mark.parametrize("name", cases("run"))
def test_golden_run_plan(name):
    case = Case(name)
    plan, captions, recorded = case.plan, case.captions, case.parameters["calls"]
    assert plan.num_chunks == case.parameters["chunk_num"]
    assert plan.total_iterations == case.parameters["total_forward_step"]
    config = case.sampling
    assert timesteps(config.num_steps, config.shortcut_mode).tolist() == [float(t) for t in case.parameters["ts"]]
    assert step_intervals(config.num_steps, config.shortcut_mode) == case.parameters["time_interval"]
    if plan.offset:
        kept = [c for c in recorded if c["extract_prefix"]][0 if config.cfg_number == 1 else 1]
        assert kept["t"] == [[call.t for call in plan.prefix_calls()]]
        ranges = [[c.kv_start * case.chunk_tokens, c.kv_end * case.chunk_tokens] for c in plan.prefix_calls()]
        assert kept["kv_range"] == ranges
    passes = [
        (branch, [call for call in calls if call.branch is branch])
        for calls in plan.iterations()
        for branch in PASSES[: config.cfg_number]
    ]
    iterations = [c for c in recorded if not c["extract_prefix"]]
    assert len(passes) == len(iterations)
    for (branch, calls), record in zip(passes, iterations, strict=True):
        assert [call.t for call in calls] == [t for row in record["t"] for t in row]
        assert [captions.tokens(call).shape[1] for call in calls] == record["text_tokens"]
        first = enumerate(calls) if branch is Pass.UNCOND else ((0, call) for call in calls)
        assert [[(c.kv_start + i) * case.chunk_tokens, (c.kv_end + i) * case.chunk_tokens] for i, c in first] == record[
            "kv_range"
        ]
        if branch is not Pass.UNCOND:
            assert calls[0].own_from == record["slice_point"]
            assert (calls[0].role is Role.CLEAN) == record["fwd_extra_1st_chunk"]


@pytest.mark.parametrize("name", cases("run"))
def test_golden_run(name):
    case = Case(name)
    noise = tensors("noise")[case.parameters["noise_key"]]
    sampler = Magi1Sampler(case.plan, noise, case.prefix)
    finished = list(sampler.run(ExactDenoiser(case.transformer, case.captions, case.plan)))
    spans = [{"chunk_idx": f.index, "latent_start": f.start, "latent_end": f.end} for f in finished]
    assert spans == case.parameters["yields"]
    reference = case.tensors["xs_final"]
    assert relative_error(sampler.latents, reference) < case.tolerance
    for chunk in finished:
        assert torch.equal(chunk.latents, sampler.latents[:, :, chunk.start : chunk.end])


@pytest.mark.parametrize("name", cases("schedule"))
def test_golden_schedules(name):
    recorded = parameters(name)
    for entry in recorded["generate_sequences"]:
        found = stages(entry["chunk_num"], entry["window"], entry["offset"])
        assert [s.chunk_start for s in found] == entry["clip_start"]
        assert [s.chunk_end for s in found] == entry["clip_end"]
        assert [s.level_start for s in found] == entry["t_start"]
        assert [s.level_end for s in found] == entry["t_end"]
    for key, values in recorded["init_t"].items():
        steps, option = key.split("|")
        if option in ("", *SHORTCUT_MODES):  # others are transforms of time that no published model uses
            assert timesteps(int(steps), option).tolist() == [float(v) for v in values], key
    for key, values in recorded["init_intervel"].items():
        steps, option = key.split("|")
        assert step_intervals(int(steps), option) == values, key


@pytest.mark.parametrize("name", cases("tokens"))
def test_golden_special_tokens(name):
    names = {}

    def labelled(prefix: str, count: int, base: int) -> Tensor:
        names.update(
            {base + i: f"{prefix}{i}" if prefix in ("text", "null") else f"{prefix}[{i}]" for i in range(count)}
        )
        return torch.arange(base, base + count, dtype=torch.float32).unsqueeze(-1)

    tokens = SpecialTokens(caption_channels=1)
    tokens.load_state_dict(
        {
            "caption_token": labelled("caption_token", 1, 10),
            "logo_token": labelled("logo_token", 1, 20),
            "other_tokens": labelled("other_tokens", 100, 100),
        }
    )
    for row in parameters(name)["rows"]:
        length = row["len"]
        captions = ChunkCaptions.build(
            labelled("text", length, 1000),
            (torch.arange(length) < row["n_valid_text"]).long(),
            labelled("null", length, 3000),
            row["chunk_num"],
            row["clean_chunks"],
            tokens,
            token_options(row["env"]),
        )
        text = [names[int(v)] for v in captions.text[row["chunk"]].flatten()]
        null = [names[int(v)] for v in captions.null.flatten()]
        assert (text[:9], text[-3:], null[:9], null[-1]) == (
            row["text_first9"],
            row["text_last3"],
            row["null_first9"],
            row["null_last"],
        )
        assert captions.text_mask[row["chunk"]].sum() == row["text_mask_sum"]
        assert captions.null_mask.sum() == row["null_mask_sum"]


@pytest.mark.parametrize("name", cases("cleaning"))
def test_golden_caption_cleaning(name):
    for case in parameters(name)["cases"]:
        assert clean_caption(case["input"]) == case["output"]


class OriginalAutoencoder(AutoencoderViTMagi1):
    """Keeps only the first frame of a tile of one latent frame, as the original code does; ours keeps all four."""

    def decode(self, latents: Tensor) -> Tensor:
        return super().decode(latents)[:, :, : 1 if latents.shape[2] == 1 else None]


@pytest.mark.parametrize("name", cases("vae"))
def test_golden_vae(name):
    recorded, stored = parameters(name), tensors(name)
    vae = OriginalAutoencoder(recorded["ddconfig"]).eval().requires_grad_(False)
    vae.load_state_dict({key: value.float() for key, value in tensors("weights_vae").items()})
    frames_per, size = vae.patch[:2]
    video, latent = stored["video_u8"].float() / 127.5 - 1, stored["latent"].float()
    tested = 0
    for key, case in recorded["cases"].items():
        if key in ("video_u8", "latent"):
            continue
        shape = case["shape"]
        tiling = _tiling(recorded["toverlap_kwargs" if "toverlap" in key else "tile_kwargs"])
        count = int(key.split("_T")[-1].split("_")[0]) if "_T" in key else None
        if key.startswith("tiled_enc"):
            result = vae.tiled_encode(video[:, :, :count], tiling)
        elif key.startswith("tiled_dec"):
            result = vae.tiled_decode(latent[:, :, :count], tiling)[0].transpose(0, 1)
        elif key.startswith("enc"):
            pixels = video[:, :, : 1 if count == 1 else shape[2] * frames_per, : shape[3] * size, : shape[4] * size]
            result = vae.moments(pixels) if "moments" in key else vae.encode(pixels)
        else:
            latents = latent[:, :, : count or shape[2] // frames_per, : shape[3] // size, : shape[4] // size]
            result = vae.decode(latents)
        assert list(result.shape) == shape, key
        if key in stored:
            assert relative_error(result, stored[key]) < VAE_TOLERANCE, key
        else:
            assert relative_error(result[:, :, ::3, ::3], stored[f"{key}.every3"]) < VAE_TOLERANCE, key
            assert relative_error(result[0], stored[f"{key}.f0"]) < VAE_TOLERANCE, key
        tested += 1
    assert tested


def _tiling(kwargs: dict) -> Tiling:
    return Tiling(
        length=kwargs["tile_sample_min_length"],
        height=kwargs["tile_sample_min_height"],
        width=kwargs["tile_sample_min_width"],
        temporal_overlap=kwargs["temporal_tile_overlap_factor"],
        spatial_overlap=kwargs["spatial_tile_overlap_factor"],
    )


def _size(step: RecordedStep) -> tuple[int, int]:
    return tuple(step.frames(step.calls[0], "x").shape[-2:])
