"""Where and in which precision a run computes."""

import pytest
import torch

from common.devices import check_offload, resolve_device, resolve_dtype
from common.errors import UserError


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(UserError, match="device: 'cuda' is not there.*use --device cpu"):
        resolve_device("cuda")
    assert resolve_device("auto") == torch.device("cpu")


@pytest.mark.parametrize("name", ["tpu", "cuda:x", "gpu"])
def test_unknown_devices_are_refused(name):
    with pytest.raises(UserError, match="is not allowed; give 'auto', 'cpu', 'cuda' or 'cuda:N'"):
        resolve_device(name)


def test_dtypes_by_device():
    assert resolve_dtype("auto", torch.device("cpu")) == torch.float32
    assert resolve_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert resolve_dtype("float16", torch.device("cpu")) == torch.float16


def test_offloading_needs_a_gpu():
    with pytest.raises(UserError, match="use --offload none"):
        check_offload("group", torch.device("cpu"))
