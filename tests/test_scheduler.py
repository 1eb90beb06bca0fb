import pickle
from copy import deepcopy

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from skyreels_v2_motioncache.scheduler import OriginalSigmasUniPC, original_sigmas
from skyreels_v2_motioncache.solver import with_host_coefficients

CONFIG = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 8.0}

# SkyworkAI/SkyReels-V2, FlowUniPCMultistepScheduler.set_timesteps(50, shift=8): linspace(0.999, 0, 51)[:-1], shifted,
# times 1000, cut to whole numbers.
FIRST = [999, 997, 994, 991, 989]
LAST = [551, 470, 363, 216]  # of 30 steps


def test_timesteps_are_those_of_the_original_repository():
    scheduler = OriginalSigmasUniPC(**CONFIG)
    scheduler.set_timesteps(50)
    assert len(scheduler.timesteps) == 50 and scheduler.timesteps.dtype == torch.int64
    assert scheduler.timesteps[:5].tolist() == FIRST
    sigma = 8 * original_sigmas(50) / (1 + 7 * original_sigmas(50))
    np.testing.assert_allclose(scheduler.sigmas[:-1], sigma, rtol=1e-6)
    assert scheduler.sigmas[-1] == 0
    scheduler.set_timesteps(30)
    assert scheduler.timesteps[-4:].tolist() == LAST


def test_library_timesteps_differ_by_up_to_six():
    ours, theirs = OriginalSigmasUniPC(**CONFIG), UniPCMultistepScheduler(**CONFIG)
    ours.set_timesteps(50)
    theirs.set_timesteps(50)
    assert (ours.timesteps - theirs.timesteps).abs().max() == 6


def test_copies_that_are_set_by_number_keep_the_levels():
    """The diffusion-forcing pipelines do this for every latent frame."""
    scheduler = OriginalSigmasUniPC.from_config(UniPCMultistepScheduler(**CONFIG).config)
    scheduler.set_timesteps(50, device="cpu")
    copy = deepcopy(scheduler)
    copy.set_timesteps(50, device="cpu")
    assert torch.equal(copy.timesteps, scheduler.timesteps) and torch.equal(copy.sigmas, scheduler.sigmas)


def test_given_sigmas_are_used():
    scheduler = OriginalSigmasUniPC(**CONFIG)
    scheduler.set_timesteps(sigmas=np.array([0.5, 0.25]))
    assert scheduler.sigmas.tolist() == pytest.approx([8 * 0.5 / 4.5, 8 * 0.25 / 2.75, 0])


def test_denoising_along_the_true_velocity_ends_at_the_clean_sample():
    scheduler = OriginalSigmasUniPC(**CONFIG)
    scheduler.set_timesteps(20)
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 4, generator=generator), torch.randn(2, 4, generator=generator)
    sigma = scheduler.sigmas[0]
    sample = (1 - sigma) * clean + sigma * noise
    for t in scheduler.timesteps:
        sample = scheduler.step(noise - clean, t, sample, return_dict=False)[0]
    torch.testing.assert_close(sample, clean, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("kind", [UniPCMultistepScheduler, OriginalSigmasUniPC])
def test_coefficients_from_the_host_give_the_same(kind, order):
    library = kind(**CONFIG, solver_order=order)
    ours = with_host_coefficients(library)
    assert isinstance(ours, kind) and ours.config.solver_order == order
    library.set_timesteps(12)
    ours.set_timesteps(12)
    generator = torch.Generator().manual_seed(0)
    expected = found = copied = torch.randn(1, 4, 8, 8, generator=generator)
    mix, copy = torch.randn(4, 4, generator=generator) / 2, deepcopy(ours)

    def velocity(x):
        return torch.tanh(torch.einsum("oc,bchw->bohw", mix, x))

    for t in library.timesteps:
        expected = library.step(velocity(expected), t, expected, return_dict=False)[0]
        found = ours.step(velocity(found), t, found, return_dict=False)[0]
        copied = copy.step(velocity(copied), t, copied, return_dict=False)[0]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(copied, found)


def test_coefficients_are_those_of_all_levels_that_a_formula_reads():
    ours = with_host_coefficients(UniPCMultistepScheduler(**CONFIG))
    for first in (0.9, 0.8):  # the same levels follow
        library = UniPCMultistepScheduler(**CONFIG)
        expected = found = torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(0))
        for scheduler in (library, ours):
            scheduler.set_timesteps(sigmas=np.array([first, 0.6, 0.3, 0.1]))
        for t in library.timesteps:
            expected = library.step(expected.tanh(), t, expected, return_dict=False)[0]
            found = ours.step(found.tanh(), t, found, return_dict=False)[0]
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_coefficients_are_worked_out_once_for_all_copies(monkeypatch):
    scheduler = with_host_coefficients(UniPCMultistepScheduler(**CONFIG))
    calls = []
    predict = UniPCMultistepScheduler.multistep_uni_p_bh_update

    def counted(self, *args, **kwargs):
        calls.append(kwargs["sample"].numel())
        return predict(self, *args, **kwargs)

    monkeypatch.setattr(UniPCMultistepScheduler, "multistep_uni_p_bh_update", counted)
    for _ in range(3):
        copy, x = deepcopy(scheduler), torch.randn(1, 4, 2, 2)
        copy.set_timesteps(5)
        for t in copy.timesteps:
            x = copy.step(x, t, x, return_dict=False)[0]
    assert len(calls) == 5 and max(calls) <= 3  # of unit vectors


@pytest.mark.parametrize("kind", [UniPCMultistepScheduler, OriginalSigmasUniPC])
def test_whoever_saves_a_scheduler_meets_the_librarys_class(kind, tmp_path):
    ours = with_host_coefficients(kind(**CONFIG))
    ours.set_timesteps(6)
    sample = torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    for t in ours.timesteps[:3]:
        sample = ours.step(sample.tanh(), t, sample, return_dict=False)[0]
    again, copy = pickle.loads(pickle.dumps(ours)), deepcopy(ours)
    assert type(again) is kind and type(copy) is type(ours) is not kind
    for t in ours.timesteps[3:]:  # all three go on from where it was
        expected = ours.step(sample.tanh(), t, sample, return_dict=False)[0]
        for scheduler in (again, copy):
            torch.testing.assert_close(scheduler.step(sample.tanh(), t, sample, return_dict=False)[0], expected)
        sample = expected
    ours.save_pretrained(tmp_path)
    assert type(kind.from_pretrained(tmp_path)) is kind
    assert kind.from_pretrained(tmp_path).config["_class_name"] == kind.__name__


def test_other_schedulers_are_left_alone():
    scheduler = FlowMatchEulerDiscreteScheduler()
    assert with_host_coefficients(scheduler) is scheduler
    ours = with_host_coefficients(UniPCMultistepScheduler(**CONFIG))
    assert with_host_coefficients(ours) is ours
