"""What the platforms answer without a GPU: FP8 recipes by hardware, and torch after the CPU platform's install."""

from __future__ import annotations

import pytest
import torch

from mcore_swift.errors import InputError
from mcore_swift.platform import cpu, cuda, select
from mcore_swift.recipe import PrecisionSection
from tests.distributed.harness import prepared


@pytest.mark.parametrize(
    ("capability", "recipes"),
    [
        ((8, 0), []),  # A100
        ((8, 9), ["tensorwise", "delayed"]),  # L40S
        ((9, 0), ["tensorwise", "delayed", "blockwise"]),  # H100
        ((10, 0), ["tensorwise", "delayed", "mxfp8"]),  # B200
    ],
)
def test_fp8_recipes_by_compute_capability(capability: tuple[int, int], recipes: list[str]) -> None:
    assert cuda.fp8_recipes(capability) == recipes


def test_fp8_that_the_gpu_lacks_is_refused_with_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *args: (9, 0))
    monkeypatch.setattr(cuda, "device_name", lambda: "NVIDIA H100 80GB HBM3")
    cuda.check_precision(PrecisionSection(fp8="blockwise"))
    with pytest.raises(
        InputError, match=r"mxfp8 does not run on NVIDIA H100.*allowed here: tensorwise, delayed, block"
    ):
        cuda.check_precision(PrecisionSection(fp8="mxfp8"))


def test_fp8_on_the_cpu_is_refused() -> None:
    cpu.check_precision(PrecisionSection())
    with pytest.raises(InputError, match=r"precision\.fp8: delayed needs an NVIDIA GPU"):
        cpu.check_precision(PrecisionSection(fp8="delayed"))


def test_the_cpu_is_chosen_where_no_gpu_is_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "device_count", lambda: 0)
    assert select("auto").name == "cpu"
    with pytest.raises(InputError, match=r"runtime\.device: cuda"):
        select("cuda")
    monkeypatch.setattr(cuda, "device_count", lambda: 2)
    assert select("auto").name == "cuda"
    assert select("cpu").name == "cpu"


def test_install_answers_for_cuda_and_may_be_called_twice() -> None:
    prepared()
    cpu.install()
    assert torch.zeros(2, device="cuda").device.type == "cpu"
    assert torch.ones(2).to("cuda:0").device.type == torch.ones(2).cuda().device.type == "cpu"
    assert torch.ones(2).type() == "torch.cuda.FloatTensor"
    assert torch.ones(2).to(torch.float64).dtype is torch.float64
    assert not torch.cuda.is_available()
    torch.cuda.manual_seed(5)
    first = torch.rand(3)
    state = torch.cuda.get_rng_state()
    torch.cuda.manual_seed(5)
    assert torch.equal(torch.rand(3), first)
    assert torch.equal(torch.cuda.get_rng_state(), state)
