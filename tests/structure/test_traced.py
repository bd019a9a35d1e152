"""Conditional U-Nets, autoencoders, networks that nobody described: groups, exact removal, one-line errors.

pytest tests/structure/test_traced.py
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from networks import first_output, random_scores, randomise
from torch import nn

import gfprune_cli
from gfprune_cli.checkpoint.shards import write_weights
from gfprune_cli.errors import GfpruneError
from gfprune_cli.inputs.examples import example_inputs
from gfprune_cli.pruning.verify import check_removal, masked_by, masked_outcome, noisy, random_part
from gfprune_cli.structure.budget import allocate
from gfprune_cli.structure.cost import CostModel, counted
from gfprune_cli.structure.graph import discover
from gfprune_cli.structure.groups import ChannelGroup, select
from gfprune_cli.structure.removal import remove

pytestmark = pytest.mark.matrix(3)

EXACT = 1e-9

CONDITIONAL: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 24,
    "attention_head_dim": 4,
}
SDXL: dict[str, Any] = {
    **CONDITIONAL,
    "block_out_channels": (8, 16, 32),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (1, 2, 4),
    "transformer_layers_per_block": (1, 2, 3),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 80,
}
AUTOENCODER: dict[str, Any] = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
    "latent_channels": 4,
    "layers_per_block": 1,
    "sample_size": 16,
}
CODEBOOK: dict[str, Any] = {
    **AUTOENCODER,
    "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
    "num_vq_embeddings": 16,
}
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "sd1": ("UNet2DConditionModel", {**CONDITIONAL, "layers_per_block": 2}),
    "sd2": (
        "UNet2DConditionModel",
        {**CONDITIONAL, "attention_head_dim": (2, 4), "use_linear_projection": True},
    ),
    "sdxl": ("UNet2DConditionModel", SDXL),
    "sd-classes": (
        "UNet2DConditionModel",
        {**CONDITIONAL, "num_class_embeds": 5, "only_cross_attention": True},
    ),
    "vae": ("AutoencoderKL", AUTOENCODER),
    "vae-bare": ("AutoencoderKL", {**AUTOENCODER, "use_quant_conv": False, "use_post_quant_conv": False}),
    "vae-flux2": ("AutoencoderKLFlux2", AUTOENCODER),
    "vq": ("VQModel", CODEBOOK),
    "movq": (
        "VQModel",
        {**CODEBOOK, "block_out_channels": (32, 64), "norm_type": "spatial", "vq_embed_dim": 4},
    ),
}
each_network = pytest.mark.parametrize("name", NETWORKS)
each_unet = pytest.mark.parametrize("name", [name for name in NETWORKS if name.startswith("sd")])
each_autoencoder = pytest.mark.parametrize("name", [name for name in NETWORKS if name.startswith("v")])

SD15: dict[str, Any] = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "block_out_channels": (320, 640, 1280, 1280),
}
SDXL_BASE: dict[str, Any] = {
    **SDXL,
    "sample_size": 128,
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "transformer_layers_per_block": (1, 2, 10),
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}

# Classes without rules of their own, and what their pipelines pass.
UNCOMMON: dict[str, tuple[dict[str, Any], dict[str, tuple[int, ...]]]] = {
    "UNet3DConditionModel": (
        {
            **CONDITIONAL,
            "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
            "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
        },
        {"sample": (1, 4, 2, 8, 8), "encoder_hidden_states": (1, 5, 24)},
    ),
    "UNetSpatioTemporalConditionModel": (
        {
            "sample_size": 8,
            "block_out_channels": (32, 64),
            "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
            "layers_per_block": 1,
            "cross_attention_dim": 8,
            "num_attention_heads": (2, 4),
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 24,
        },
        {"sample": (1, 2, 8, 8, 8), "encoder_hidden_states": (1, 1, 8), "added_time_ids": (1, 3)},
    ),
    "UVit2DModel": (
        {
            "hidden_size": 16,
            "cond_embed_dim": 8,
            "micro_cond_encode_dim": 4,
            "micro_cond_embed_dim": 20,
            "encoder_hidden_size": 8,
            "vocab_size": 12,
            "codebook_size": 10,
            "in_channels": 16,
            "block_out_channels": 16,
            "num_res_blocks": 1,
            "block_num_heads": 2,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "sample_size": 8,
        },
        {"encoder_hidden_states": (1, 5, 8), "pooled_text_emb": (1, 8), "micro_conds": (1, 5)},
    ),
    "Kandinsky3UNet": (
        {
            "time_embedding_dim": 16,
            "groups": 4,
            "attention_head_dim": 4,
            "layers_per_block": 2,
            "block_out_channels": (16, 16, 32, 32),
            "cross_attention_dim": 8,
            "encoder_hid_dim": 8,
        },
        {"sample": (1, 4, 8, 8), "encoder_hidden_states": (1, 5, 8), "encoder_attention_mask": (1, 5)},
    ),
    "StableCascadeUNet": (
        {
            "in_channels": 4,
            "out_channels": 4,
            "timestep_ratio_embedding_dim": 8,
            "patch_size": 1,
            "conditioning_dim": 16,
            "block_out_channels": (16, 32),
            "num_attention_heads": (0, 4),
            "down_num_layers_per_block": (1, 1),
            "up_num_layers_per_block": (1, 1),
            "down_blocks_repeat_mappers": (1, 1),
            "up_blocks_repeat_mappers": (1, 1),
            "block_types_per_layer": (
                ("SDCascadeResBlock", "SDCascadeTimestepBlock"),
                ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),
            ),
            "clip_text_in_channels": 8,
            "clip_text_pooled_in_channels": 8,
            "clip_image_in_channels": 8,
            "clip_seq": 2,
            "switch_level": (False,),
            "dropout": (0.0, 0.0),
        },
        {
            "sample": (1, 4, 8, 8),
            "clip_text_pooled": (1, 1, 8),
            "clip_text": (1, 5, 8),
            "clip_img": (1, 1, 8),
        },
    ),
}
UNIDIMENSIONAL: dict[str, Any] = {
    "sample_size": 64,
    "extra_in_channels": 64,
    "block_out_channels": (32, 32, 64),
}


def network(name: str, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    class_name, config = NETWORKS[name]
    model = randomise(getattr(diffusers, class_name)(**{**config, **changes}), 0)
    return nn.Module.to(model, dtype).eval().requires_grad_(False)


def inputs_of(model: Any) -> dict[str, Any]:
    """Zeros for one sample, made into noise for two."""
    template = example_inputs(model)
    doubled = {
        name: {key: torch.cat([tensor] * 2) for key, tensor in value.items()}
        if isinstance(value, dict)
        else torch.cat([value] * 2)
        for name, value in template.items()
    }
    found: dict[str, Any] = noisy(doubled, next(model.parameters()).dtype)
    return found


@functools.cache
def structure(name: str) -> tuple[tuple[ChannelGroup, ...], CostModel]:
    class_name, config = NETWORKS[name]
    with torch.device("meta"):
        model = getattr(diffusers, class_name)(**config)
    groups, trace = discover(model)
    return groups, CostModel(model, groups, trace)


def any_mask(groups: tuple[ChannelGroup, ...], seed: int) -> dict[str, torch.Tensor]:
    source = torch.Generator().manual_seed(seed)
    kept = {group.name: torch.rand(group.units, generator=source) < 0.5 for group in groups}
    for group in groups:
        kept[group.name][int(torch.randint(group.units, (), generator=source))] = True
    return kept


def gap(narrow: nn.Module, model: nn.Module, groups: Any, kept: Any, made: Any) -> float:
    """Relative difference of the narrow and the masked network."""
    with masked_by(model, groups, kept) as masked, torch.no_grad():
        expected = masked_outcome(masked, made)
        return float((first_output(narrow, made) - expected).norm() / expected.norm())


def produced(groups: tuple[ChannelGroup, ...]) -> dict[str, ChannelGroup]:
    return {member.module: group for group in groups for member in group.producers}


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# --- groups --------------------------------------------------------------------------------------


@each_unet
def test_every_head_unit_and_channel_is_found(name: str) -> None:
    """Whole heads of self- and cross-attention, units of gated feed-forwards, channels of residual blocks."""
    groups, _ = structure(name)
    found = produced(groups)
    model = network(name)
    for module_name, module in model.named_modules():
        kind: Any = module
        if module_name.endswith((".attn1", ".attn2")):
            group = found[f"{module_name}.to_q"]
            assert group.unit_size == kind.to_q.out_features // kind.heads
            assert group.units == kind.heads
            assert found[f"{module_name}.to_k"] is found[f"{module_name}.to_v"] is group
        elif type(module).__name__ == "GEGLU":
            group = found[f"{module_name}.proj"]
            assert 2 * group.channels == kind.proj.out_features
            both = next(member for member in group.members if member.module == f"{module_name}.proj")
            halves = both.positions.view(2, -1)[0], both.positions.view(2, -1)[1]
            assert torch.equal(halves[0] + group.channels, halves[1])
            assert torch.equal(*(both.channels.view(2, -1)))
        elif type(module).__name__ == "ResnetBlock2D":
            assert {f"{module_name}.conv1", f"{module_name}.conv2"} <= found.keys()


@each_unet
def test_residual_streams_and_the_outside_keep_their_width(name: str) -> None:
    groups, _ = structure(name)
    pruned, dense = remove(network(name), groups, any_mask(groups, 1)), network(name)
    for module_name, module in dense.named_modules():
        narrow: Any = pruned.get_submodule(module_name)
        if isinstance(module, nn.LayerNorm):
            assert narrow.normalized_shape == module.normalized_shape
        if module_name.endswith(("attn2.to_k", "attn2.to_v")):
            assert narrow.in_features == 24  # the text encoder's
        if module_name in ("conv_in", "time_embedding.linear_1", "add_embedding.linear_1"):
            assert narrow.weight.shape[1] == module.weight.shape[1]  # type: ignore[union-attr,index]
    assert pruned.conv_out.out_channels == 4
    assert pruned.config.cross_attention_dim == 24


@each_unet
def test_width_adds_the_residual_streams_of_transformers(name: str) -> None:
    """Their layer norms become mask-aware, so that this is exact too."""
    model = network(name)
    made = inputs_of(model)
    without, with_width = discover(model)[0], discover(model, width=True)[0]
    streams = {group.name for group in with_width} - {group.name for group in without}
    assert streams
    for group in with_width:
        norms = [member for member in group.members if ".norm" in member.module and "blocks" in member.module]
        layer_norms = [m for m in norms if isinstance(model.get_submodule(m.module), nn.LayerNorm)]
        assert bool(layer_norms) is (group.name in streams)
    kept = any_mask(with_width, 4)
    assert gap(remove(model, with_width, kept), model, with_width, kept, made) < EXACT


@each_autoencoder
def test_images_latents_and_codebooks_keep_their_width(name: str) -> None:
    groups, _ = structure(name)
    dense = network(name)
    pruned = remove(dense, groups, any_mask(groups, 2))
    stay = ("quant_conv", "post_quant_conv", "quantize.embedding")
    for module_name, module in dense.named_modules():
        if module_name in stay:
            weight: Any = pruned.get_submodule(module_name).weight
            assert weight.shape == module.weight.shape
    narrow: Any = pruned
    assert (narrow.encoder.conv_in.in_channels, narrow.decoder.conv_out.out_channels) == (3, 3)
    wide: Any = dense
    assert narrow.encoder.conv_out.out_channels == wide.encoder.conv_out.out_channels
    assert narrow.decoder.conv_in.in_channels == wide.decoder.conv_in.in_channels
    assert parameters(pruned) < 0.6 * parameters(dense)


@each_autoencoder
def test_pruned_halves_work_by_themselves(name: str) -> None:
    """A pipeline calls encoder and decoder apart; together they are the whole."""
    groups, _ = structure(name)
    narrow: Any = remove(network(name), groups, any_mask(groups, 2))
    made = inputs_of(narrow)
    with torch.no_grad():
        code = narrow.encode(made["sample"])
        latents = code.latent_dist.mode() if hasattr(code, "latent_dist") else code.latents
        assert torch.equal(narrow.decode(latents).sample, first_output(narrow, made))


# --- exactness, counts, budgets ------------------------------------------------------------------


@each_network
@pytest.mark.parametrize("seed", range(3))
def test_removal_is_exact_for_any_binary_mask(name: str, seed: int) -> None:
    groups, cost = structure(name)
    kept = any_mask(groups, seed)
    model = network(name)
    made = inputs_of(model)
    narrow = remove(model, groups, kept)
    assert gap(narrow, model, groups, kept, made) < EXACT
    widths = {group.name: int(kept[group.name].sum()) * group.unit_size for group in groups}
    assert cost.params(widths) == parameters(narrow)
    assert cost.params({}) == parameters(model)


@each_network
@pytest.mark.parametrize("sparsity", [0.3, 0.6])
@pytest.mark.parametrize("budget", ["both", "params"])
def test_the_budget_is_met(name: str, sparsity: float, budget: str) -> None:
    groups, cost = structure(name)
    scores = random_scores(groups, 0)
    widths = allocate(cost, scores, sparsity, budget=budget).kept
    kept = {group.name: select(group, scores[group.name], widths[group.name]) for group in groups}
    model = network(name)
    achieved = {
        "params": 1 - parameters(remove(model, groups, kept)) / parameters(model),
        "macs": 1 - cost.macs(widths) / cost.macs({}),
    }
    assert 0 <= min(achieved[key] for key in counted(budget)) - sparsity <= 0.01


@each_network
def test_pruned_networks_are_pruned_again_and_come_back_from_disk(name: str, tmp_path: Path) -> None:
    first, _ = structure(name)
    once = remove(network(name, torch.float32), first, any_mask(first, 3))
    groups, trace = discover(once)
    assert CostModel(once, groups, trace).params({}) == parameters(once)
    twice = remove(once, groups, random_part(groups))
    write_weights(tmp_path, twice, None, None)
    loaded: Any = gfprune_cli.load(tmp_path)
    assert type(loaded).__name__ == f"Pruned{NETWORKS[name][0]}"
    state = twice.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in loaded.state_dict().items())
    made = inputs_of(loaded)
    with torch.no_grad():  # matrix products may round by where their factors lie in memory
        assert torch.allclose(first_output(loaded, made), first_output(twice, made), atol=1e-4)


@pytest.mark.matrix(2)  # `analyze` of SDXL's configuration is in tests/commands/test_demo.py
@pytest.mark.parametrize(
    ("config", "expected"), [(SD15, 859_520_964), (SDXL_BASE, 2_567_463_684)], ids=["SD 1.5", "SDXL"]
)
def test_real_configurations_count_right(config: dict[str, Any], expected: int) -> None:
    """Stable Diffusion 1.5 and SDXL from their configurations alone."""
    with torch.device("meta"):
        model: Any = diffusers.UNet2DConditionModel(**config)
    groups, trace = discover(model)
    cost = CostModel(model, groups, trace)
    assert cost.params({}) == expected
    fewest = {group.name: group.step for group in groups}
    assert cost.params(fewest) < 0.2 * expected


# --- networks without rules of their own ---------------------------------------------------------


def uncommon(name: str) -> tuple[Any, dict[str, Any]]:
    config, shapes = UNCOMMON[name]
    model = randomise(getattr(diffusers, name)(**config), 0).eval().requires_grad_(False)
    made: dict[str, Any] = {key: torch.randn(shape) for key, shape in shapes.items()}
    if name == "UVit2DModel":
        made["input_ids"] = torch.zeros(1, 8, 8, dtype=torch.long)
    elif name == "StableCascadeUNet":
        made["timestep_ratio"] = torch.full((1,), 0.3)
    else:
        made["timestep"] = torch.ones(1)
    return model, made


@pytest.mark.parametrize("name", UNCOMMON)
def test_uncommon_networks_are_traced(name: str) -> None:
    """Whatever is found is exact, also where a part of the network has to stay as it is."""
    model, made = uncommon(name)
    groups, trace = discover(model, made)
    assert groups
    cost = CostModel(model, groups, trace)
    assert cost.params({}) == parameters(model)
    assert check_removal(model, groups, made) < EXACT


class Sums(nn.Module):
    """A chain of sums of two, whose paths double with each, beside a layer of another width."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.config: dict[str, Any] = {}
        self.first, self.beside, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(12, 3, 1)
        self.count = count

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        x = self.first(sample)
        for _ in range(self.count):
            x = x * 0.5 + x.tanh()
        return self.last(torch.cat([x, self.beside(sample)], 1))


def test_long_chains_of_sums_keep_their_width() -> None:
    """2^24 paths lead back from the last sum to the layer before the first."""
    model = Sums(24).requires_grad_(False)
    made = {"sample": torch.randn(1, 3, 4, 4)}
    read = {
        group.name: [member.positions.tolist() for member in group.members if member.module == "last"]
        for group in discover(model, made)[0]
    }
    assert read == {"first": [[*range(8)]], "beside": [[*range(8, 12)]]}


class Emptying(nn.Module):
    """Takes its features off a list, as U-Nets take those of adapters."""

    def forward(self, sample: torch.Tensor, features: list[torch.Tensor]) -> torch.Tensor:
        return sample + features.pop(0)


def test_a_network_may_empty_the_lists_that_it_is_given() -> None:
    given = {"sample": torch.zeros(1), "features": [torch.ones(1)]}
    assert [first_output(Emptying(), given).item() for _ in range(2)] == [1.0, 1.0]


def test_the_features_of_a_hint_keep_their_channels() -> None:
    """They are joined to the noisy sample, at whose side no group begins."""
    config = {**CONDITIONAL, "in_channels": 8, "out_channels": 4, "encoder_hid_dim": 24}
    config |= {"addition_embed_type": "image_hint", "encoder_hid_dim_type": "image_proj"}
    model = randomise(diffusers.UNet2DConditionModel(**config), 0).eval().requires_grad_(False)
    picture = {"image_embeds": torch.randn(1, 24), "hint": torch.randn(1, 3, 64, 64)}
    made = {"sample": torch.randn(1, 4, 8, 8), "timestep": torch.ones(1), "encoder_hidden_states": None}
    made |= {"added_cond_kwargs": picture}
    groups, _ = discover(model, made)
    assert "add_embedding.input_hint_block.12" in produced(groups)
    assert "add_embedding.input_hint_block.14" not in produced(groups)
    assert check_removal(model, groups, made) < EXACT


def test_a_module_that_cannot_be_narrowed_is_named() -> None:
    """UNet1DModel keeps the number of heads beside its attention, in a class with rules of its own."""
    model = randomise(diffusers.UNet1DModel(**UNIDIMENSIONAL), 0).eval()
    made = {"sample": torch.randn(1, 2, 64), "timestep": torch.ones(1)}
    groups, _ = discover(model, made)
    with pytest.raises(
        GfpruneError, match=r"narrow network fails in '\w+_blocks.\d.attentions.0': "
    ) as caught:
        check_removal(model, groups, made)
    assert "\n" not in str(caught.value)


def test_a_failing_trace_names_the_module() -> None:
    model = network("sd1")
    with pytest.raises(
        GfpruneError, match=r"cannot trace UNet2DConditionModel at '.*attn2.to_k': RuntimeError"
    ):
        discover(model, {**inputs_of(model), "encoder_hidden_states": torch.zeros(2, 5, 7).double()})
    assert not any(len(module._forward_hooks) for module in model.modules())


def test_nothing_to_remove_names_what_stands_in_the_way() -> None:
    options = dict(num_attention_heads=1, attention_head_dim=4, in_channels=4, norm_num_groups=2)

    class Stream(nn.Module):
        """A layer norm over the only channels there are."""

        def __init__(self) -> None:
            super().__init__()
            self.config = diffusers.Transformer2DModel(**options).config
            self.before, self.norm, self.after = nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 4)

        def forward(self, sample: torch.Tensor) -> torch.Tensor:
            output: torch.Tensor = self.after(self.norm(self.before(sample)))
            return output

    with pytest.raises(
        GfpruneError, match="no channel of Stream can be removed exactly: 'norm' stands in the way"
    ):
        discover(Stream(), {"sample": torch.zeros(1, 3, 4)})


# --- the check itself ----------------------------------------------------------------------------


@each_network
def test_the_check_passes_and_leaves_the_network_alone(name: str) -> None:
    groups, _ = structure(name)
    model = network(name, torch.float32)
    made = inputs_of(model)
    before, modules = {key: t.clone() for key, t in model.state_dict().items()}, list(model.modules())
    assert 0 <= check_removal(model, groups, made) < EXACT
    assert check_removal(model, groups, made) == check_removal(model, groups, made)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert all(old is new for old, new in zip(modules, model.modules(), strict=True))


def test_large_networks_are_checked_without_a_copy() -> None:
    groups, _ = structure("sd2")
    model = network("sd2", torch.float32)
    made, modules = inputs_of(model), list(model.modules())
    assert check_removal(model, groups, made, doubles=False) < 1e-4
    assert all(old is new for old, new in zip(modules, model.modules(), strict=True))
    assert check_removal(nn.Module.to(model, torch.bfloat16), groups, made, doubles=False) < 1e-4


def test_an_activation_that_does_not_vanish_is_found() -> None:
    """sigmoid(0) is not 0: the masked network hands on what the narrow one has no more."""
    groups, _ = structure("sd1")
    model = network("sd1", act_fn="silu", time_embedding_act_fn=None)
    cut = [group for group in groups if group.name == "time_embedding.linear_1"]
    assert check_removal(model, tuple(cut), inputs_of(model)) < EXACT
    pruned_class = type(model)
    constructor = pruned_class.__init__
    try:
        pruned_class.__init__ = patched(constructor)
        broken = network("sd1")
        with pytest.raises(GfpruneError, match=r"outputs differ by .*, first in 'time_embedding.linear_2'"):
            check_removal(broken, tuple(cut), inputs_of(broken))
    finally:
        pruned_class.__init__ = constructor


def patched(constructor: Any) -> Any:
    @functools.wraps(constructor)
    def extended(self: Any, *args: Any, **options: Any) -> None:
        constructor(self, *args, **options)
        self.time_embedding.act = nn.Sigmoid()

    return extended


def test_a_forgotten_member_is_found() -> None:
    groups, _ = structure("sd1")
    victim = next(group for group in groups if group.name.endswith("resnets.0.conv1"))
    less = dataclasses.replace(victim, members=victim.members[:-1])
    model = network("sd1")
    with pytest.raises(GfpruneError, match=r"the narrow network fails in 'down_blocks\.0\.resnets\.0"):
        check_removal(model, (less,), inputs_of(model))


def test_channels_under_a_norm_within_a_function_stay() -> None:
    """The U-Net of the latent upscaler: a norm whose scale and shift follow from the noise level counts its
    channels itself, so that its residual blocks stay whole, and heads go."""
    changes: dict[str, Any] = dict(
        block_out_channels=(32, 64, 64),
        down_block_types=("KDownBlock2D", "KCrossAttnDownBlock2D", "KCrossAttnDownBlock2D"),
        up_block_types=("KCrossAttnUpBlock2D", "KCrossAttnUpBlock2D", "KUpBlock2D"),
        mid_block_type=None,
        norm_num_groups=None,
        resnet_time_scale_shift="scale_shift",
        attention_head_dim=8,
        act_fn="gelu",
        timestep_post_act="gelu",
        conv_in_kernel=1,
        conv_out_kernel=1,
        time_embedding_type="fourier",
    )
    model = network("sd1", **changes)
    groups, _ = discover(model)
    assert any(".attn" in group.name for group in groups)
    assert not any("resnets" in group.name for group in groups)
    assert check_removal(model, groups, inputs_of(model)) < EXACT
