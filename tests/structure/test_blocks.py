"""Depth: residual blocks leave softly, and their removal changes nothing."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    CogVideoXTransformer3DModel,
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)
from image_pipelines import PIPELINES
from pipelines import FAMILIES
from torch import nn
from transformers_zoo import OTHERS, build, build_other, inputs

import gfprune_cli
from gfprune_cli.checkpoint.reader import inspect, load_model
from gfprune_cli.checkpoint.source import resolve
from gfprune_cli.errors import UsageError
from gfprune_cli.families.table import has_known_inputs, pairs
from gfprune_cli.flow.criteria import Evidence, score
from gfprune_cli.flow.mask import MaskedModel, full_masks
from gfprune_cli.inputs.examples import example_inputs
from gfprune_cli.structure import blocks
from gfprune_cli.structure.blocks import block_groups
from gfprune_cli.structure.budget import allocate
from gfprune_cli.structure.correspondence import correspondence
from gfprune_cli.structure.cost import CostModel
from gfprune_cli.structure.graph import discover
from gfprune_cli.structure.removal import remove

UNET = dict(
    sample_size=16,
    block_out_channels=(16, 32),
    norm_num_groups=4,
    attention_head_dim=8,
    layers_per_block=2,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
)
XL = dict(
    sample_size=8,
    block_out_channels=(16, 32),
    norm_num_groups=4,
    attention_head_dim=4,
    layers_per_block=1,
    cross_attention_dim=16,
    transformer_layers_per_block=3,
    use_linear_projection=True,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
)
HEADS = dict(attention_head_dim=8, num_attention_heads=2)
NETWORKS: dict[str, tuple[type, dict[str, Any], int]] = {  # class, configuration, blocks that may go
    "unet": (UNet2DModel, UNET, 5),
    "text-unet": (UNet2DConditionModel, XL, 15),
    "dit": (
        DiTTransformer2DModel,
        dict(HEADS, in_channels=4, num_layers=4, sample_size=8, norm_num_groups=4, num_embeds_ada_norm=10),
        3,
    ),
    "sd3": (
        SD3Transformer2DModel,
        dict(HEADS, num_layers=4, sample_size=8, patch_size=2, in_channels=4, out_channels=4,
             joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=16,
             pos_embed_max_size=8),
        3,
    ),
    "sd3-dual": (
        SD3Transformer2DModel,
        dict(HEADS, num_layers=4, sample_size=8, patch_size=2, in_channels=4, out_channels=4,
             joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=16,
             pos_embed_max_size=8,
             dual_attention_layers=(0, 1), qk_norm="rms_norm"),
        3,
    ),
    "flux": (
        FluxTransformer2DModel,
        dict(HEADS, num_layers=2, num_single_layers=3, in_channels=4, joint_attention_dim=16,
             pooled_projection_dim=16, axes_dims_rope=(2, 2, 4)),
        5,
    ),
    "cogvideox": (
        CogVideoXTransformer3DModel,
        dict(HEADS, num_layers=3, in_channels=4, out_channels=4, time_embed_dim=16, text_embed_dim=16,
             sample_width=8, sample_height=8, sample_frames=5, max_text_seq_length=8),
        3,
    ),
    "qwen-image": (
        QwenImageTransformer2DModel, OTHERS["QwenImageTransformer2DModel"][0] | dict(num_layers=3), 3
    ),
}  # fmt: skip


def random_network(name: str) -> Any:
    cls, config, _ = NETWORKS[name]
    torch.manual_seed(0)
    network = cls(**config).double().eval()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    return network


def random_inputs(network: Any) -> dict[str, Any]:
    """Inputs that are not zero where they are floating point."""

    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: filled(entry) for name, entry in value.items()}
        return torch.randn_like(value) if value.is_floating_point() and value.ndim > 1 else value

    torch.manual_seed(1)
    if not has_known_inputs(network):
        return build_other(type(network).__name__)[1]
    return filled(example_inputs(network))


def output_of(network: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = network(**inputs, return_dict=False)[0]
    return found


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_without_some_blocks_computes_what_the_masked_one_computes(name: str) -> None:
    network = random_network(name)
    groups, inputs = block_groups(network), random_inputs(network)
    assert len(groups) == NETWORKS[name][2]
    dense = output_of(network, inputs)
    kept = {group.name: torch.tensor([number % 2 == 1]) for number, group in enumerate(groups)}
    assert not all(kept.values())
    masked = MaskedModel(copy.deepcopy(network), groups)
    assert torch.equal(output_of(masked.model, inputs), dense), "full masks change nothing"
    masked.set_masks({group: units.double() for group, units in kept.items()})
    expected = output_of(masked.model, inputs)
    assert not torch.allclose(expected, dense)
    removed = remove(network, groups, kept)
    assert torch.allclose(output_of(removed, inputs), expected, rtol=1e-9, atol=1e-12)
    cost = CostModel(network, groups, discover(network, inputs)[1])
    widths = {group: int(units) for group, units in kept.items()}
    assert cost.params(widths) == sum(parameter.numel() for parameter in removed.parameters())


def test_a_half_masked_block_adds_half_of_what_it_adds() -> None:
    network = random_network("dit")
    block = network.transformer_blocks[1]
    stream, time, label = torch.randn(1, 16, 16).double(), torch.ones(1), torch.zeros(1, dtype=torch.long)
    call = dict(timestep=time, class_labels=label)
    whole = block(stream, **call)
    masked = MaskedModel(network, block_groups(network))
    half = full_masks(masked.groups)
    half["transformer_blocks.1"][0] = 0.5
    masked.set_masks(half)
    assert torch.allclose(block(stream, **call), (stream + whole) / 2)


@pytest.mark.parametrize("name", ["pixart", "sana", "ltx"])
def test_blocks_that_change_the_type_of_their_stream_are_masked_under_autocast(name: str) -> None:
    network = nn.Module.to(build(name), torch.float32)
    given = {
        key: value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for key, value in inputs(network).items()
    }
    with torch.autocast("cpu", torch.bfloat16):
        dense = output_of(network, given)
        masked = MaskedModel(network, block_groups(network))
        # the memory layout of a stream changes, and with it the rounding in half precision
        torch.testing.assert_close(output_of(network, given), dense, rtol=2e-2, atol=5e-2)
        masked.set_masks({group: mask * 0 for group, mask in masked.masks.items()})
        assert not torch.equal(output_of(network, given), dense)


@pytest.mark.parametrize("criterion", ["magnitude", "random"])
def test_blocks_without_channels_to_go_have_scores_of_their_own(criterion: str) -> None:
    network = random_network("dit")
    with torch.no_grad():
        for parameter in network.transformer_blocks[2].parameters():
            parameter.mul_(0.1)
    scores = score(criterion, Evidence(MaskedModel(network, block_groups(network)), [], 0))
    assert len({float(value) for value in scores.values()}) == len(scores)
    if criterion == "magnitude":
        assert min(scores, key=lambda name: float(scores[name])) == "transformer_blocks.2"


@pytest.mark.parametrize("name", [name for name, (cls, *_) in NETWORKS.items() if "UNet" not in cls.__name__])
def test_a_transformer_that_lost_blocks_alone_is_of_the_stock_class(name: str) -> None:
    network = random_network(name)
    groups = block_groups(network)
    kept = {group.name: torch.tensor([number != 0]) for number, group in enumerate(groups)}
    removed: Any = remove(network, groups, kept)
    assert type(removed) is type(network)
    assert removed.config.num_layers == network.config.num_layers - 1
    again = type(network).from_config(removed.config)
    assert again.state_dict().keys() == removed.state_dict().keys()


def test_blocks_that_attend_twice_are_numbered_anew() -> None:
    """Stable Diffusion 3.5 lists them in its configuration, which names them in the stock class."""
    network = random_network("sd3-dual")
    groups = block_groups(network, stock=True)
    kept = {group.name: torch.tensor([number != 0]) for number, group in enumerate(groups)}
    removed: Any = remove(network, groups, kept)
    assert type(removed) is SD3Transformer2DModel
    assert [block.use_dual_attention for block in removed.transformer_blocks] == [True, False, False]
    assert list(removed.config.dual_attention_layers) == [0]
    assert correspondence(network, groups, kept).config == {"num_layers": 4, "dual_attention_layers": (0, 1)}


@pytest.mark.parametrize("name", ["flux", "cogvideox", "qwen-image"])
def test_blocks_that_no_key_counts_hand_on_their_streams(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order in which each class returns them; the pruned class is told which these are."""
    monkeypatch.setattr(blocks, "LENGTHS", {})
    network = random_network(name)
    groups, inputs = block_groups(network), random_inputs(network)
    kept = {group.name: torch.tensor([number != 0]) for number, group in enumerate(groups)}
    masked = MaskedModel(copy.deepcopy(network), groups)
    masked.set_masks({group: units.double() for group, units in kept.items()})
    removed: Any = remove(network, groups, kept)
    streams = pairs()[type(network.transformer_blocks[0]).__name__]
    assert removed.config.gfprune["modules"] == {groups[0].name: {"identity": list(streams)}}
    assert torch.allclose(output_of(removed, inputs), output_of(masked.model, inputs), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["unet", "text-unet", "dit"])
@pytest.mark.parametrize("sparsity", [0.3, 0.6])
@pytest.mark.parametrize("budget", ["both", "params", "macs"])
def test_channels_and_blocks_share_one_budget(name: str, sparsity: float, budget: str) -> None:
    network = random_network(name)
    channels, trace = discover(network)
    groups = channels + block_groups(network)
    cost = CostModel(network, groups, trace)
    torch.manual_seed(0)
    scores = {group.name: torch.rand(group.units) + 0.5 for group in groups}
    # a block that costs nothing to lose goes first
    cheap = next(group.name for group in groups if group.stack)
    scores[cheap] = torch.zeros(1)
    found = allocate(cost, scores, sparsity, budget=budget)
    assert 0 <= found.sparsity - sparsity <= 0.01
    assert found.kept[cheap] == 0
    for group in channels:
        assert found.kept[group.name] > 0
    for stack in {group.stack for group in groups if group.stack}:
        assert sum(found.kept[group.name] for group in groups if group.stack == stack) >= 1
    assert {group.name: group.channels for group in groups}[cheap] == 1


QUICK = dict(images=4, sample_steps=2, draws=4, iterations=2, recover=1)
ONCE: dict[str, Any] = QUICK | {"iterations": 1}


@pytest.fixture(scope="module")
def dit_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pipeline with blocks to spare."""
    folder = FAMILIES["dit"](tmp_path_factory.mktemp("dit") / "dit")
    shallow = DiTTransformer2DModel.from_pretrained(folder / "transformer")
    torch.manual_seed(0)
    deep = DiTTransformer2DModel.from_config(dict(shallow.config) | {"num_layers": 8})
    for parameter in deep.parameters():
        nn.init.normal_(parameter, std=0.05)
    deep.save_pretrained(folder / "transformer")
    return folder


def test_the_native_layout_of_a_transformer_loses_blocks_and_loads_in_the_stock_class(
    dit_pipeline: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="only knows fewer blocks: add --blocks"):
        gfprune_cli.prune(str(dit_pipeline), layout="native", sparsity=0.3, out=tmp_path / "none")
    done = gfprune_cli.prune(
        str(dit_pipeline), layout="native", blocks=True, sparsity=0.3, out=tmp_path / "fewer", **QUICK
    )
    assert done.class_name == "DiTTransformer2DModel"
    stock = DiTTransformer2DModel.from_pretrained(tmp_path / "fewer" / "transformer")
    assert sum(parameter.numel() for parameter in stock.parameters()) == done.params["after"]
    assert stock.config.num_layers < json.loads((dit_pipeline / "transformer" / "config.json").read_text())[
        "num_layers"
    ]  # fmt: skip
    tuned = gfprune_cli.finetune(
        tmp_path / "fewer", out=tmp_path / "tuned", steps=2, sample_every=0, images=4, sample_steps=2, batch=2
    )
    assert tuned.loss["after"] is not None


@pytest.mark.slow
@pytest.mark.parametrize("family", [pytest.param("sd3", marks=pytest.mark.thorough), "qwen-image"])
def test_the_native_layout_of_two_streams_loses_blocks(family: str, tmp_path: Path) -> None:
    """Of Stable Diffusion 3.5, whose blocks differ, and of Qwen-Image, whose inputs are recorded."""
    folder = (FAMILIES | PIPELINES)[family](tmp_path / "dense")
    shallow: Any = load_model(inspect(resolve(str(folder))))
    deeper = {key: [0, 1] for key in ("dual_attention_layers",) if key in shallow.config}
    torch.manual_seed(0)
    deep = type(shallow).from_config({**shallow.config, "num_layers": 4, **deeper})
    for parameter in deep.parameters():
        nn.init.normal_(parameter, std=0.05)
    deep.save_pretrained(folder / "transformer")
    done = gfprune_cli.prune(
        str(folder), layout="native", blocks=True, sparsity=0.4, size="16", out=tmp_path / "fewer", **ONCE
    )
    assert done.class_name == type(deep).__name__
    assert done.loss["removed"] == pytest.approx(done.loss["masked"], rel=1e-4)
    stock = type(deep).from_pretrained(tmp_path / "fewer" / "transformer")
    assert stock.config.num_layers < 4
    assert sum(parameter.numel() for parameter in stock.parameters()) == done.params["after"]


def test_blocks_that_go_are_neighbours_where_that_is_asked_for(dit_pipeline: Path, tmp_path: Path) -> None:
    """In the native layout, and beside channels, where their order holds as well."""
    for layout in ("native", "adaptive"):
        out = tmp_path / layout
        gfprune_cli.prune(
            str(dit_pipeline), layout=layout, blocks=True, contiguous=True, sparsity=0.4, out=out,
            **ONCE | {"refit": False, "recover": 0},
        )  # fmt: skip
        gone = json.loads((out / "gfprune.json").read_text())["map"]["gone"]
        numbers = sorted(int(name.rpartition(".")[2]) for name in gone)
        assert len(numbers) > 1
        assert numbers == list(range(numbers[0], numbers[-1] + 1))
    with pytest.raises(UsageError, match="--contiguous is about blocks: add --blocks"):
        gfprune_cli.prune(str(dit_pipeline), contiguous=True, out=tmp_path / "none")


def test_a_run_over_blocks_width_and_channels_resumes_analyzes_and_learns_features(
    dit_pipeline: Path, tmp_path: Path
) -> None:
    settings = dict(blocks=True, prune_width=True, sparsity=0.4, **QUICK)
    done = gfprune_cli.prune(str(dit_pipeline), out=tmp_path / "pruned", **settings)
    assert abs(done.sparsity["achieved"] - 0.4) <= 0.01
    assert done.loss["masked"] == pytest.approx(done.loss["removed"], rel=1e-4)
    found = gfprune_cli.analyze(str(dit_pipeline), sparsity=[0.4], blocks=True, prune_width=True)
    whole = gfprune_cli.analyze(str(dit_pipeline))
    extra = {group.name for group in found.groups} - {group.name for group in whole.groups}
    assert any(name.startswith("transformer_blocks.") for name in extra)
    assert len(extra) >= 2
    tuned = gfprune_cli.finetune(
        tmp_path / "pruned",
        out=tmp_path / "tuned",
        steps=2,
        sample_every=0,
        images=4,
        sample_steps=2,
        batch=2,
        features=0.1,
    )
    assert tuned.loss["after"] is not None
