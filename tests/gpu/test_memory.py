"""On a GPU: device memory as workers report it."""

import pytest
import torch

from service.worker.memory import memory_bytes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_a_gpu_reports_what_torch_has() -> None:
    """In use, and held."""
    device = torch.device("cuda:0")
    before = memory_bytes(device)
    held = torch.ones(1 << 20, device=device)
    after = memory_bytes(device)
    assert set(after) == {"allocated", "reserved"}
    assert after["allocated"] - before.get("allocated", 0) == held.nbytes
    assert after["reserved"] >= after["allocated"]
