"""The native layout of text-to-image U-Nets: the stock class at one narrower width per stage, whole heads.

pytest tests/test_native_text.py
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from pipelines import FAMILIES, conditional_unet, filled

import gfprune_cli
from gfprune_cli.errors import UsageError
from gfprune_cli.inputs.examples import example_inputs
from gfprune_cli.pruning.verify import masked_by, masked_outcome, noisy, relative_gap
from gfprune_cli.structure.cost import CostModel
from gfprune_cli.structure.graph import discover
from gfprune_cli.structure.groups import select
from gfprune_cli.structure.native import native_allocation
from gfprune_cli.structure.removal import remove_native

SIMPLE = dict(
    down_block_types=("SimpleCrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "SimpleCrossAttnUpBlock2D"),
    mid_block_type="UNetMidBlock2DSimpleCrossAttn",
    attention_head_dim=8,
)
UNETS: dict[str, dict[str, Any]] = {
    "convolutions": {},
    "joined": SIMPLE,
    "linear": dict(use_linear_projection=True, attention_head_dim=(3, 8)),
    "three-stages": dict(
        block_out_channels=(16, 32, 48),
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 1),
    ),
}


@pytest.mark.parametrize("name", UNETS)
@pytest.mark.parametrize("groups_of_norms", [1, 8])
def test_a_native_text_to_image_unet_is_the_masked_one(name: str, groups_of_norms: int) -> None:
    """In the stock class alone; exactly where no norm's groups straddle a seam, as with a single group."""
    torch.manual_seed(0)
    model = filled(conditional_unet(**UNETS[name], norm_num_groups=groups_of_norms)).double()
    model.requires_grad_(False)
    groups, trace = discover(model, width=True, stages=True)
    cost = CostModel(model, groups, trace)
    allocation, config = native_allocation(model, cost, 0.3, "both")
    assert allocation.sparsity > 0.05
    source = torch.Generator().manual_seed(1)
    kept = {
        group.name: select(group, torch.rand(group.units, generator=source), allocation.kept[group.name])
        for group in groups
    }
    native: Any = remove_native(model, groups, kept, config)
    assert sum(parameter.numel() for parameter in native.parameters()) == cost.params(allocation.kept)
    public = {key: value for key, value in native.config.items() if not key.startswith("_")}
    fresh = UNet2DConditionModel(**public).double().eval()
    fresh.load_state_dict(native.state_dict(), strict=True)

    inputs = noisy(example_inputs(model), torch.float64)
    with torch.no_grad():
        output = fresh(**inputs, return_dict=False)[0]
        assert torch.equal(output, native(**inputs, return_dict=False)[0])
    with masked_by(model, groups, kept) as masked:
        gap = relative_gap(output, masked_outcome(masked, inputs))
    if groups_of_norms == 1:
        assert gap < 1e-6
    else:
        assert gap < 0.5


def test_what_the_stock_class_cannot_express_is_no_allocation() -> None:
    """Two equally wide stages have no shortcut between them, so that one alone cannot narrow."""
    with torch.device("meta"):
        model = conditional_unet(block_out_channels=(32, 32), attention_head_dim=4)
    groups, trace = discover(model, width=True, stages=True)
    allocation, config = native_allocation(model, CostModel(model, groups, trace), 0.3, "both")
    assert allocation.sparsity == 0
    assert config["block_out_channels"] == (32, 32)


def test_heads_counted_by_their_dimension_stay_so() -> None:
    """Blocks of plain cross-attention read the same key of the configuration as the dimension of a head."""
    with torch.device("meta"):
        model = conditional_unet(**SIMPLE, block_out_channels=(16, 32))
    groups, trace = discover(model, width=True, stages=True)
    allocation, config = native_allocation(model, CostModel(model, groups, trace), 0.3, "both")
    assert allocation.sparsity > 0
    assert config["attention_head_dim"] == 8


@pytest.mark.slow
def test_native_prune_and_finetune_load_in_stock_pipelines(tmp_path: Path) -> None:
    """One flag less for whoever serves the result; features are distilled on the channels that are left."""
    dense = FAMILIES["stable-diffusion"](tmp_path / "dense")
    options: dict[str, Any] = dict(images=4, sample_steps=2)
    asked: dict[str, Any] = dict(sparsity=0.3, layout="native", draws=4, recover=0, refit=False)
    planned = gfprune_cli.prune(str(dense), dry_run=True, **asked)
    pruned = gfprune_cli.prune(str(dense), out=tmp_path / "pruned", **asked, **options)
    assert pruned.class_name == "UNet2DConditionModel"
    assert planned.params == pruned.params
    tuned = gfprune_cli.finetune(
        tmp_path / "pruned", out=tmp_path / "tuned", steps=1, batch=2, features=0.1, sample_every=0, **options
    )
    for folder in (pruned.output, tuned.output):
        unet = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True).unet
        assert type(unet) is UNet2DConditionModel
        assert sum(parameter.numel() for parameter in unet.parameters()) == pruned.params["after"]
        assert not list(Path(str(folder)).rglob("*.py"))


def test_native_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    """Where the widths are tied the dry run says so, and the run in the same words."""
    from pipelines import PNDMScheduler, stable_diffusion

    unet = conditional_unet(block_out_channels=(32, 32), attention_head_dim=4)
    dense = stable_diffusion(tmp_path / "tied", unet, PNDMScheduler(skip_prk_steps=True))
    said = []
    for dry_run in (True, False):
        with pytest.raises(UsageError, match="widths are tied") as refused:
            gfprune_cli.prune(str(dense), layout="native", dry_run=dry_run, out=tmp_path / "out")
        said.append(str(refused.value))
    assert said[0] == said[1]
