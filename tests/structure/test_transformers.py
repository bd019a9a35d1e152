"""Diffusion transformers: what may be removed, what it costs, and that removal changes nothing but the size.

pytest tests/structure/test_transformers.py
"""

import copy
import functools
import math
from collections import Counter
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.normalization import FP32LayerNorm, MochiRMSNorm, RMSNorm
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode
from transformers_zoo import OTHERS, SMALL, ZOO, build, build_other, double_precision, inputs, meta

from gfprune_cli.checkpoint.modeling.gfprune_models_v2 import pruned_class
from gfprune_cli.errors import GfpruneError, UsageError
from gfprune_cli.flow.mask import MaskedModel
from gfprune_cli.flow.masked_norms import MaskedFeatureNorm
from gfprune_cli.inputs.examples import example_inputs
from gfprune_cli.structure.blocks import block_groups
from gfprune_cli.structure.budget import allocate
from gfprune_cli.structure.cost import CostModel, counted
from gfprune_cli.structure.graph import discover
from gfprune_cli.structure.groups import ChannelGroup, select
from gfprune_cli.structure.removal import remove
from gfprune_cli.structure.search import TOLERANCE
from gfprune_cli.structure.trace import Trace
from gfprune_cli.structure.width import width_group

pytestmark = pytest.mark.matrix(3)

Kept = dict[str, torch.Tensor]
Structure = tuple[tuple[ChannelGroup, ...], Trace, CostModel]

EXACT = 1e-9  # relative, in float64
WIDTH = "+width"
each_network = pytest.mark.parametrize("name", ZOO)
each_structure = pytest.mark.parametrize("name", [*ZOO, *(name + WIDTH for name in ZOO)])
few = settings(max_examples=4, derandomize=True, phases=[Phase.generate])

# (channels, channels per unit, members): how many groups have them
EXPECTED: dict[str, dict[tuple[int, int, int], int]] = {
    "dit": {(32, 8, 4): 2, (128, 1, 2): 2},
    "pixart": {(48, 8, 4): 4, (192, 1, 2): 2},
    # the last block keeps no text: no output projection of it, no feed-forward
    "sd3": {(32, 8, 8): 1, (32, 8, 7): 1, (128, 1, 2): 3},
    "sd3.5": {(32, 8, 8): 1, (32, 8, 7): 1, (32, 8, 4): 1, (128, 1, 2): 3},
    "flux": {(32, 8, 8): 2, (32, 8, 4): 2, (128, 1, 2): 6},
    "sana": {(32, 8, 4): 4, (80, 1, 3): 2},
    "sana-sprint": {(32, 8, 6): 4, (80, 1, 3): 2},
    "cogvideox": {(32, 8, 4): 2, (128, 1, 2): 2},
    "cogvideox-rotary": {(32, 8, 4): 2, (128, 1, 2): 2},
    "wan": {(32, 8, 6): 4, (48, 1, 2): 2},
    "wan-image": {(32, 8, 6): 2, (32, 8, 9): 2, (48, 1, 2): 2, (12, 1, 2): 1},
    # self-attention has the rotary angles as a member too
    "ltx": {(32, 8, 7): 2, (32, 8, 6): 2, (128, 1, 2): 2},
    "stable-audio": {(32, 8, 4): 2, (16, 8, 4): 2, (128, 1, 2): 2},
}


def read(name: str, model: Any) -> tuple[tuple[ChannelGroup, ...], Trace]:
    """Groups and trace at small inputs; of the residual stream too if the name says so."""
    return discover(model, example_inputs(model, SMALL), width=name.endswith(WIDTH))


@functools.cache
def structure(name: str) -> Structure:
    """Channel groups, trace and cost of one of `ZOO`; they depend on shapes alone."""
    model = meta(name.removesuffix(WIDTH))
    groups, trace = read(name, model)
    return groups, trace, CostModel(model, groups, trace)


def network(name: str, dtype: torch.dtype = torch.float64) -> Any:
    return build(name.removesuffix(WIDTH), dtype=dtype)


@st.composite
def some_units(draw: Any, name: str) -> Kept:
    """Any units of every group of a network, at least one in each."""
    kept = {}
    for group in structure(name)[0]:
        alive = draw(st.lists(st.booleans(), min_size=group.units, max_size=group.units))
        alive[draw(st.integers(0, group.units - 1))] = True
        kept[group.name] = torch.tensor(alive)
    return kept


def random_units(name: str, seed: int, ratio: float = 0.6) -> Kept:
    source = torch.Generator().manual_seed(seed)
    kept = {}
    for group in structure(name)[0]:
        kept[group.name] = torch.rand(group.units, generator=source) < ratio
        kept[group.name][int(torch.randint(group.units, (1,), generator=source))] = True
    return kept


def widths(groups: tuple[ChannelGroup, ...], kept: Kept) -> dict[str, int]:
    return {group.name: int(kept[group.name].sum()) * group.unit_size for group in groups}


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def run(model: nn.Module, made: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad(), double_precision():
        output: torch.Tensor = model(**made, return_dict=False)[0]
    return output


def run_masked(model: nn.Module, groups: tuple[ChannelGroup, ...], kept: Kept, made: Any) -> torch.Tensor:
    """Output at binary masks; replaces norms of `model`."""
    masked = MaskedModel(model, groups, {name: alive.double() for name, alive in kept.items()})
    with torch.no_grad(), double_precision():
        output: torch.Tensor = functional_call(
            masked.model, dict(masked.passing()), (), {**made, "return_dict": False}
        )[0]
    return output


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


# --- groups --------------------------------------------------------------------------------------


@each_network
def test_every_head_and_every_unit_is_found(name: str) -> None:
    groups, _, _ = structure(name)
    found = Counter((group.channels, group.unit_size, len(group.members)) for group in groups)
    assert found == EXPECTED[name]


def test_groups_come_in_the_order_in_which_the_network_runs_them() -> None:
    names = [group.name for group in structure("flux")[0]]
    assert names[:3] == [
        "transformer_blocks.0.attn.to_q",
        "transformer_blocks.0.ff.net.0.proj",
        "transformer_blocks.0.ff_context.net.0.proj",
    ]
    assert names[-2:] == ["single_transformer_blocks.1.proj_mlp", "single_transformer_blocks.1.attn.to_q"]


def test_fused_projections_hold_heads_and_units() -> None:
    """FLUX.2's single-stream blocks make queries, keys, values and both halves of the units at once."""
    model, made = build_other("Flux2Transformer2DModel")
    groups, _ = discover(model, made)
    sizes = {group.name.rpartition(".attn.")[2]: (group.channels, group.unit_size) for group in groups[-2:]}
    assert sizes == {"to_qkv_mlp_proj": (32, 8), "mlp_act_fn": (96, 1)}


def test_attention_with_weights_of_an_unknown_kind_keeps_its_heads() -> None:
    """Nobody knows what the extra weights do to a head, so that it cannot be removed exactly."""
    model = build("dit")
    model.transformer_blocks[0].attn1.gate = nn.Linear(32, 4)
    names = [group.name for group in discover(model)[0]]
    assert "transformer_blocks.0.attn1.to_q" not in names
    assert "transformer_blocks.1.attn1.to_q" in names


def test_a_single_head_stays() -> None:
    config = {**ZOO["dit"][1], "num_attention_heads": 1, "attention_head_dim": 32}
    groups, _ = discover(diffusers.DiTTransformer2DModel(**config))
    assert [group.unit_size for group in groups] == [1, 1]


def test_discovery_needs_no_weights_and_leaves_the_model_as_it_was() -> None:
    """Networks on the CPU are traced without computing with their weights."""
    model = build("flux")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found, _ = discover(model, example_inputs(model, SMALL))
    assert [group.name for group in found] == [group.name for group in structure("flux")[0]]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_inputs_that_do_not_fit_are_one_line() -> None:
    model = meta("dit")
    with pytest.raises(GfpruneError, match="cannot trace DiTTransformer2DModel"):
        discover(model, {"hidden_states": torch.zeros(1, 3, 8, 8, device="meta")})


# --- costs ---------------------------------------------------------------------------------------


def counted_macs(model: nn.Module, made: dict[str, Any]) -> int:
    """Multiply-accumulates that torch counts in every matrix product, convolution and attention."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**made, return_dict=False)
    return counter.get_total_flops() // 2


# products that are no layer's: features of the time, position tables
ELSEWHERE = {"stable-audio": 8}


@each_structure
def test_costs_are_the_real_ones_before_and_after_removal(name: str) -> None:
    """Parameters, and the MACs that torch counts, of the dense network and of the one removal builds."""
    groups, _, cost = structure(name)
    kept = random_units(name, 0)
    pruned = remove(meta(name.removesuffix(WIDTH)), groups, kept)
    for model, channels in ((meta(name.removesuffix(WIDTH)), {}), (pruned, widths(groups, kept))):
        assert cost.params(channels) == parameters(model)
        expected = counted_macs(model, example_inputs(model, SMALL)) - ELSEWHERE.get(
            name.removesuffix(WIDTH), 0
        )
        assert cost.macs(channels) == expected


@each_network
@pytest.mark.parametrize("sparsity", [0.3, 0.5])
@pytest.mark.parametrize("budget", ["both", "params", "macs"])
def test_sparsity_is_met_within_a_point(name: str, sparsity: float, budget: str) -> None:
    """Where the groups hold that much; tiny networks are mostly modulation and embeddings."""
    groups, _, cost = structure(name)
    scores = {group.name: torch.linspace(1, 2, group.units) for group in groups}
    fewest = {group.name: group.step for group in groups}
    most = min(1 - cost.total(fewest, key) / cost.total({}, key) for key in counted(budget))
    if most < sparsity:
        with pytest.raises(UsageError, match=f"the nearest is {math.floor(1000 * most) / 1000:.3f}"):
            allocate(cost, scores, sparsity, budget=budget)
        return
    found = allocate(cost, scores, sparsity, budget=budget)
    kept = {group.name: select(group, scores[group.name], found.kept[group.name]) for group in groups}
    left = {key: cost.total(widths(groups, kept), key) for key in counted(budget)}
    binding = max(left[key] / cost.total({}, key) for key in left)
    assert 0 <= 1 - binding - sparsity <= TOLERANCE
    if "params" in left:
        assert parameters(remove(meta(name), groups, kept)) == left["params"]


@pytest.mark.parametrize(
    ("cls", "config", "expected"),
    [
        ("FluxTransformer2DModel", {"guidance_embeds": True}, 11_901_408_320),  # FLUX.1-dev
        (
            "SD3Transformer2DModel",  # Stable Diffusion 3 medium
            {
                "num_layers": 24,
                "num_attention_heads": 24,
                "caption_projection_dim": 1536,
                "pos_embed_max_size": 192,
            },
            2_028_328_000,
        ),
        (
            "PixArtTransformer2DModel",  # PixArt-alpha XL/2 1024
            {"caption_channels": 4096, "use_additional_conditions": True},
            611_349_152,
        ),
        ("SanaTransformer2DModel", {}, 1_604_462_752),  # Sana 1600M 1024
        # DiT-XL/2 256: 675 M, and diffusers gives each of the 28 blocks its own time and class embedding
        ("DiTTransformer2DModel", {"out_channels": 8}, 749_826_464),
    ],
)
def test_published_networks_have_their_published_sizes(
    cls: str, config: dict[str, Any], expected: int
) -> None:
    with torch.device("meta"):
        model = getattr(diffusers, cls)(**config)
    groups, trace = discover(model)
    cost = CostModel(model, groups, trace)
    assert cost.params({}) == parameters(model) == expected
    assert all(tensor.is_meta for tensor in model.parameters())
    removable = 1 - cost.params({group.name: group.step for group in groups}) / expected
    assert removable > 0.5


def test_linear_attention_costs_as_much_per_token_at_every_size() -> None:
    """Sana's self-attention grows with the tokens, its cross-attention with both sides."""
    model = meta("sana")
    small, large = (
        discover(model, {**example_inputs(model), "hidden_states": torch.zeros(1, 4, size, size)})[1]
        for size in (8, 16)
    )
    own, cross = "transformer_blocks.0.attn1", "transformer_blocks.0.attn2"
    assert large.attention[own] == 4 * small.attention[own] == 4 * (8 + 1) * (64 + 64)
    assert small.attention[cross] == 2 * 64 * 300


# --- removal -------------------------------------------------------------------------------------


@each_structure
@few
@given(data=st.data())
def test_removal_computes_what_the_masked_network_computes(name: str, data: Any) -> None:
    groups, _, _ = structure(name)
    kept = data.draw(some_units(name))
    model = network(name)
    made = inputs(model)
    pruned = remove(model, groups, kept)
    assert relative_error(run(pruned, made), run_masked(model, groups, kept, made)) <= EXACT


@each_structure
def test_what_is_removed_mattered(name: str) -> None:
    """The networks of these tests are no trivial ones: half of each group changes the output."""
    groups, _, _ = structure(name)
    model = network(name)
    made = inputs(model)
    dense = run(model, made)
    for group in groups:
        kept = {other.name: torch.ones(other.units, dtype=torch.bool) for other in groups}
        kept[group.name][: group.units // 2] = False
        assert relative_error(run(remove(model, groups, kept), made), dense) > 1e-6, group.name


@each_structure
def test_a_pruned_network_can_be_pruned_again(name: str) -> None:
    groups, _, _ = structure(name)
    model = network(name)
    made = inputs(model)
    once = remove(model, groups, random_units(name, 1, 0.8))
    again, _ = read(name, once)
    kept = {group.name: torch.arange(group.units) != 0 for group in again}
    twice = remove(once, again, kept)
    assert relative_error(run(twice, made), run_masked(once, again, kept, made)) <= EXACT


@each_structure
def test_pruned_networks_reload_bit_for_bit(name: str, tmp_path: Path) -> None:
    """From configuration and weights, and from the files that diffusers writes and reads."""
    groups, _, _ = structure(name)
    model = network(name, dtype=torch.float32)
    pruned: Any = remove(model, groups, random_units(name, 2))
    made = inputs(model)
    with torch.no_grad():
        expected = pruned(**made, return_dict=False)[0]
        cls = pruned_class(ZOO[name.removesuffix(WIDTH)][0])
        from_config = cls.from_config(pruned.config).eval()
        from_config.load_state_dict(pruned.state_dict())
        assert torch.equal(from_config(**made, return_dict=False)[0], expected)
        assert torch.equal(copy.deepcopy(pruned)(**made, return_dict=False)[0], expected)
        pruned.save_pretrained(tmp_path)
        loaded = cls.from_pretrained(tmp_path)
        assert dict(loaded.config)["gfprune"] == pruned.config.gfprune
        # weights that lie in a mapped file are not aligned, and matrix products round by alignment
        loaded.load_state_dict(
            {key: value.clone() for key, value in loaded.state_dict().items()}, assign=True
        )
        assert torch.equal(loaded(**made, return_dict=False)[0], expected)


@pytest.mark.parametrize("name", OTHERS)
def test_other_classes_of_the_same_blocks_are_exact_too(name: str) -> None:
    """Nothing is written down about these classes: their inputs are enough, and mostly follow by name."""
    model, made = build_other(name)
    groups, trace = discover(model, made)
    if name == "QwenImageTransformer2DModel":  # a list of shapes, which no key of its configuration tells
        with pytest.raises(GfpruneError, match=f"the inputs of {name} are not known"):
            discover(model)
    else:
        assert [group.name for group in discover(model)[0]] == [group.name for group in groups]
    source = torch.Generator().manual_seed(0)
    kept = {group.name: torch.rand(group.units, generator=source) < 0.6 for group in groups}
    for alive in kept.values():
        alive[0] = True
    pruned = remove(model, groups, kept)
    cost = CostModel(model, groups, trace)
    assert parameters(pruned) == cost.params(widths(groups, kept)) < 0.9 * cost.params({})
    expected = run_masked(copy.deepcopy(model), groups, kept, made)
    assert relative_error(run(pruned, made), expected) <= EXACT
    if name != "Lumina2Transformer2DModel":  # the shapes in it depend on its text mask
        empty = tree_map(lambda value: value.to("meta") if isinstance(value, torch.Tensor) else value, made)
        for network, channels in ((model, {}), (pruned, widths(groups, kept))):
            assert counted_macs(network.to("meta"), empty) == cost.macs(channels)


def test_heads_that_stay_keep_their_rotary_angles() -> None:
    """LTX turns all heads at once, each by angles of its own."""
    name = "transformer_blocks.0.attn1.to_q"
    groups, _, _ = structure("ltx")
    kept = {group.name: torch.ones(group.units, dtype=torch.bool) for group in groups}
    kept[name] = torch.tensor([False, True, False, True])
    model = build("ltx")
    pruned: Any = remove(model, groups, kept)
    assert pruned.config.gfprune["modules"]["transformer_blocks.0.attn1"] == {
        "heads": 2,
        "rotary_heads": [1, 3],
    }
    again, _ = discover(pruned, example_inputs(pruned, SMALL))
    kept = {group.name: torch.ones(group.units, dtype=torch.bool) for group in again}
    kept[name] = torch.tensor([False, True])
    twice: Any = remove(pruned, again, kept)
    assert twice.transformer_blocks[0].attn1.rotary_heads == [3]


# --- the residual stream -------------------------------------------------------------------------


@each_network
def test_the_width_of_the_stream_is_one_more_group(name: str) -> None:
    plain, wide = structure(name)[0], structure(name + WIDTH)[0]
    (stream,) = {group.name for group in wide} - {group.name for group in plain}
    group = next(group for group in wide if group.name == stream)
    heads = ZOO[name][1]["num_attention_heads"] * 8
    # PixArt composes part of its time embedding of three parts: a unit is one channel of each
    assert group.channels == (heads // 3 if name == "pixart" else heads)


@each_network
def test_blocks_width_heads_and_units_may_go_at_once(name: str) -> None:
    model = build(name)
    made = inputs(model)
    groups = (*structure(name + WIDTH)[0], *block_groups(model))
    kept = random_units(name + WIDTH, 3)
    kept |= {group.name: torch.tensor([group.name.endswith(".0")]) for group in block_groups(model)}
    pruned = remove(model, groups, kept)
    cost = CostModel(model, groups, structure(name)[1])
    assert cost.params(widths(groups, kept)) == parameters(pruned)
    assert relative_error(run(pruned, made), run_masked(model, groups, kept, made)) <= EXACT


def test_more_is_within_reach_with_the_width() -> None:
    for name in ("dit", "sd3", "flux"):
        costs = structure(name)[2], structure(name + WIDTH)[2]
        least = [cost.params({group: own.step for group, own in cost.groups.items()}) for cost in costs]
        assert least[1] < 0.6 * least[0]


@pytest.mark.parametrize("name", ["dit", "pixart"])
def test_position_tables_are_right_for_pictures_of_every_size(name: str) -> None:
    """diffusers computes the table of another size anew, of the channels that are left."""
    groups, _, _ = structure(name + WIDTH)
    kept = random_units(name + WIDTH, 3)
    for size in (4, 8, 12):
        model = build(name)
        made = inputs(model)
        made["hidden_states"] = torch.randn(1, 4, size, size, dtype=torch.float64)
        twice: Any = remove(model, groups, kept)
        assert relative_error(run(twice, made), run_masked(model, groups, kept, made)) <= EXACT


def test_a_module_that_stands_in_the_way_of_the_width_is_named() -> None:
    model = meta("dit")
    model.transformer_blocks[1].norm2 = nn.Bilinear(2, 2, 2)
    with pytest.raises(GfpruneError, match=r"transformer_blocks\.1\.norm2 \(Bilinear\) stands in the way"):
        width_group(model)
    other = diffusers.PriorTransformer(
        num_attention_heads=2, attention_head_dim=8, num_layers=1, embedding_dim=8
    )
    with pytest.raises(GfpruneError, match="PriorTransformer"):
        width_group(other)


# --- norms ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda size: nn.LayerNorm(size),
        lambda size: nn.LayerNorm(size, elementwise_affine=False),
        lambda size: nn.LayerNorm(size, bias=False),
        lambda size: FP32LayerNorm(size),
        lambda size: nn.RMSNorm(size),
        lambda size: nn.RMSNorm(size, eps=1e-3, elementwise_affine=False),
        lambda size: RMSNorm(size, eps=1e-3, bias=True),
        lambda size: RMSNorm(size, eps=1e-3, elementwise_affine=False),
        lambda size: MochiRMSNorm(size, eps=1e-3),
    ],
)
@few
@given(alive=st.lists(st.booleans(), min_size=6, max_size=6).filter(any), seed=st.integers(0, 100))
def test_masked_norms_are_those_of_the_features_that_are_left(
    make: Any, alive: list[bool], seed: int
) -> None:
    """At masks of 0 and 1: nothing where a feature is gone, and elsewhere the norm of the others."""
    source = torch.Generator().manual_seed(seed)
    mask = torch.tensor(alive)
    plain, narrow = make(6).double(), make(int(mask.sum())).double()
    with torch.no_grad():
        for leaf in ("weight", "bias"):
            if getattr(plain, leaf, None) is not None:
                getattr(plain, leaf).copy_(torch.randn(6, generator=source))
                getattr(narrow, leaf).copy_(getattr(plain, leaf)[mask])
        x = torch.randn(2, 3, 6, generator=source, dtype=torch.float64)
        aware = MaskedFeatureNorm(plain)
        with double_precision():
            torch.testing.assert_close(aware(x), plain(x), rtol=1e-9, atol=1e-12)
            for leaf in ("weight", "bias"):  # as the masked model does
                if getattr(aware, leaf) is not None:
                    getattr(aware, leaf).mul_(mask)
            aware.set_mask(mask.double())
            found = aware(x * mask)
            torch.testing.assert_close(found[..., mask], narrow(x[..., mask]), rtol=1e-9, atol=1e-12)
        assert bool((found[..., ~mask] == 0).all())


def test_a_masked_norm_without_anything_left_is_finite() -> None:
    norm = MaskedFeatureNorm(nn.RMSNorm(4))
    norm.set_mask(torch.zeros(4))
    assert bool(norm(torch.zeros(2, 4)).isfinite().all())
