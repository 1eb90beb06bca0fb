"""Convolutions in oneDNN give what PyTorch's own do."""

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import nn

from common.convolutions import use_onednn


def small_vae() -> AutoencoderKLWan:
    torch.manual_seed(0)
    return AutoencoderKLWan(base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[True]).eval()


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")
def test_an_autoencoder_decodes_the_same_through_onednn_alone() -> None:
    vae = small_vae()
    latents = torch.randn(1, 4, 3, 6, 6)
    with torch.no_grad():
        expected = vae.decode(latents).sample
        use_onednn(vae)
        with torch.profiler.profile() as profile:
            decoded = vae.decode(latents).sample
    names = {event.key for event in profile.key_averages()}
    assert "aten::mkldnn_convolution" in names
    assert not names & {"aten::slow_conv3d_forward", "aten::_slow_conv2d_forward", "aten::thnn_conv2d"}
    torch.testing.assert_close(decoded, expected, atol=1e-5, rtol=1e-5)


def test_gradients_and_other_dtypes_take_the_usual_way() -> None:
    conv = nn.Conv3d(2, 3, 3, padding=1, bias=False)
    use_onednn(conv)
    conv(torch.randn(1, 2, 4, 4, 4)).sum().backward()
    assert conv.weight.grad is not None
    with torch.no_grad():
        assert conv.double()(torch.randn(1, 2, 4, 4, 4, dtype=torch.float64)).dtype == torch.float64


def test_a_copied_convolution_keeps_its_own_weight() -> None:
    import copy

    conv = nn.Conv2d(1, 1, 1, bias=False)
    use_onednn(conv)
    twin = copy.deepcopy(conv)
    nn.init.constant_(twin.weight, 2.0)
    with torch.no_grad():
        assert twin(torch.ones(1, 1, 2, 2)).eq(2).all()
