"""Depth of text-to-image U-Nets that the stock class can express: layers, transformer blocks, the middle."""

import copy
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import UNet2DConditionModel
from pipelines import FAMILIES
from torch import nn

import gfprune_cli
from gfprune_cli.errors import UsageError
from gfprune_cli.flow.mask import MaskedModel
from gfprune_cli.inputs.examples import example_inputs
from gfprune_cli.structure.blocks import block_groups
from gfprune_cli.structure.correspondence import correspondence
from gfprune_cli.structure.cost import CostModel
from gfprune_cli.structure.graph import discover
from gfprune_cli.structure.removal import remove

SHARED: dict[str, Any] = dict(
    sample_size=8, norm_num_groups=4, attention_head_dim=2, cross_attention_dim=8, use_linear_projection=True
)
NETWORKS: dict[str, dict[str, Any]] = {
    # as SDXL: the middle is as deep as the last stage
    "deep": dict(
        block_out_channels=(8, 8, 16),
        layers_per_block=2,
        transformer_layers_per_block=[1, 2, 3],
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    ),
    # as Stable Diffusion: no attention in the last stage
    "plain": dict(
        block_out_channels=(8, 16),
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ),
    "three layers": dict(
        block_out_channels=(8, 16),
        layers_per_block=[2, 3],
        transformer_layers_per_block=[1, 2],
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    ),
}
COUNTS = {"deep": 3 + 1 + (2 + 3) * 2 + (3 + 2) * 3, "plain": 2 + 1, "three layers": 3 + 1 + 3 * 2 + 4 * 2}


def network(name: str) -> Any:
    torch.manual_seed(0)
    found = UNet2DConditionModel(**SHARED, **NETWORKS[name]).double().eval()
    for parameter in found.parameters():
        nn.init.normal_(parameter, std=0.2)
    return found


def inputs_of(model: Any) -> dict[str, Any]:
    torch.manual_seed(1)
    found = example_inputs(model)
    return {key: torch.randn_like(value) if value.ndim > 1 else value for key, value in found.items()}


def output(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**inputs, return_dict=False)[0]
    return found


@pytest.mark.matrix(2)
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("seed", range(4))
def test_the_shorter_stock_network_computes_what_the_masked_one_computes(name: str, seed: int) -> None:
    """Whatever part of the blocks goes; names and weights are those of the record's map."""
    dense = network(name)
    groups, inputs = block_groups(dense, stock=True), inputs_of(dense)
    assert len(groups) == COUNTS[name]
    source = torch.Generator().manual_seed(seed)
    first = int(torch.randint(len(groups), (), generator=source))
    kept = {
        group.name: torch.rand(1, generator=source) < 0.5 * (number != first)
        for number, group in enumerate(groups)
    }
    masked = MaskedModel(copy.deepcopy(dense), groups)
    masked.set_masks({group: units.double() for group, units in kept.items()})
    expected = output(masked.model, inputs)
    assert not torch.allclose(expected, output(dense, inputs))
    short: Any = remove(dense, groups, kept)
    assert type(short) is UNet2DConditionModel
    torch.testing.assert_close(output(short, inputs), expected, rtol=1e-9, atol=1e-12)
    again = UNet2DConditionModel.from_config(short.config)
    again.load_state_dict(short.state_dict(), strict=True)
    cost = CostModel(dense, groups, discover(dense)[1])
    widths = {group: int(units) for group, units in kept.items()}
    assert cost.params(widths) == sum(parameter.numel() for parameter in short.parameters())
    places, left = correspondence(dense, groups, kept), short.state_dict()
    found = {places.new_name(key): value for key, value in dense.state_dict().items()}
    found.pop(None, None)
    assert found.keys() == left.keys()
    assert all(torch.equal(found[key], left[key]) for key in left)
    whole = UNet2DConditionModel.from_config({**short.config, **places.config})
    assert list(whole.state_dict()) == list(dense.state_dict())


def test_a_middle_that_has_to_stay_as_deep_as_its_stage_is_skipped_in_the_adaptive_layout() -> None:
    dense = network("deep")
    groups = block_groups(dense)
    alone = "mid_block.attentions.0.transformer_blocks.1"
    kept = {group.name: torch.tensor([group.name != alone]) for group in groups}
    assert type(remove(dense, groups, kept)).__name__ == "PrunedUNet2DConditionModel"


@pytest.mark.thorough  # networks alone have tests
@pytest.mark.slow
def test_a_pipeline_without_some_blocks_loads_in_the_stock_classes(tmp_path: Path) -> None:
    dense = FAMILIES["stable-diffusion"](tmp_path / "dense")
    deep = UNet2DConditionModel.from_pretrained(dense / "unet")
    torch.manual_seed(0)
    config = dict(deep.config) | {"layers_per_block": 2, "transformer_layers_per_block": 2}
    UNet2DConditionModel.from_config(config).save_pretrained(dense / "unet")
    options: dict[str, Any] = dict(images=4, sample_steps=2)
    asked: dict[str, Any] = dict(draws=4, recover=0, refit=False, **options)
    out = tmp_path / "short"
    done = gfprune_cli.prune(str(dense), layout="native", blocks=True, sparsity=0.3, out=out, **asked)
    assert done.class_name == "UNet2DConditionModel"
    assert done.loss["masked"] == pytest.approx(done.loss["removed"], rel=1e-4)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(out)
    assert sum(parameter.numel() for parameter in pipeline.unet.parameters()) == done.params["after"]
    tuned = gfprune_cli.finetune(out, out=tmp_path / "tuned", steps=1, sample_every=0, batch=2, **options)
    assert tuned.loss["after"] is not None


def test_a_unet_without_blocks_that_may_go_is_refused(pipeline_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot leave out blocks: drop --blocks, or use adaptive"):
        gfprune_cli.prune(
            str(pipeline_folder), layout="native", blocks=True, sparsity=0.3, out=tmp_path / "none"
        )
