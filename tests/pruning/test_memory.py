"""What a run will need is known before it starts."""

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from networks import PLAIN
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gfprune_cli.errors import GfpruneError
from gfprune_cli.inputs.examples import example_inputs
from gfprune_cli.pruning import memory
from gfprune_cli.pruning.memory import Need, check_memory, kept_for_backward
from gfprune_cli.runtime.device import offload

TEXT = dict(
    sample_size=16,
    block_out_channels=(32, 64),
    norm_num_groups=8,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    cross_attention_dim=32,
    attention_head_dim=4,
    layers_per_block=1,
)


def kept_by_autograd(model: nn.Module) -> int:
    """Numbers in the tensors that a forward pass saves for its backward pass, weights not counted."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes() // 4
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), sdpa_kernel(SDPBackend.MATH):
        output = model(**example_inputs(model), return_dict=False)[0]
    assert output.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize(("cls", "config"), [(UNet2DModel, PLAIN), (UNet2DConditionModel, TEXT)])
def test_the_estimate_from_the_meta_device_is_near_what_autograd_keeps(cls: type, config: dict) -> None:
    with torch.device("meta"):
        planned = cls(**config)
    inputs = example_inputs(planned)
    estimate = kept_for_backward(planned, lambda network: network(**inputs, return_dict=False))
    assert 0.7 < kept_by_autograd(cls(**config)) / estimate < 1.4


def test_a_run_that_cannot_fit_is_refused_with_both_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available", lambda device: 3 << 30)
    check_memory(Need(2 << 30, 1 << 29), torch.device("cpu"), "use --one-shot")
    with pytest.raises(GfpruneError, match=r"4\.5 GiB on cpu, and 3\.0 GiB are free: use --one-shot"):
        check_memory(Need(4 << 30, 1 << 29), torch.device("cpu"), "use --one-shot")


def test_the_limit_of_a_container_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    unlimited = memory.available(torch.device("cpu"))
    (tmp_path / "memory.max").write_text("5000000\n")
    (tmp_path / "memory.current").write_text("1000000\n")
    assert memory.available(torch.device("cpu")) == 4_000_000 < unlimited
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available(torch.device("cpu")) > 4_000_000


def test_an_offloaded_teacher_says_the_same_and_holds_no_weights_between_calls() -> None:
    torch.manual_seed(0)
    teacher = UNet2DModel(**PLAIN).requires_grad_(False)
    x, timesteps = torch.randn(2, 3, 16, 16), torch.tensor([3, 700])
    expected = teacher(x, timesteps).sample
    offload(teacher, torch.device("cpu"))
    assert torch.equal(teacher(x, timesteps).sample, expected)
    assert {parameter.device.type for parameter in teacher.parameters()} == {"meta"}
