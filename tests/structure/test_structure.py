"""What may be removed, what it costs, and that removal changes nothing but the size.

pytest tests/structure/test_structure.py
"""

import math
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention, AttnProcessor
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from networks import (
    NETWORKS,
    build,
    class_labels_in_its_dtype,
    inputs,
    plain_norms,
    random_scores,
    structure,
)
from torch import nn

from gfprune_cli.checkpoint.modeling.gfprune_models_v2 import UnevenGroupNorm, pruned_class
from gfprune_cli.errors import GfpruneError, UsageError
from gfprune_cli.flow.mask import MaskedModel
from gfprune_cli.inputs.examples import example_inputs
from gfprune_cli.structure import budget as budgets
from gfprune_cli.structure.budget import allocate
from gfprune_cli.structure.cost import BOTH, CostModel, counted
from gfprune_cli.structure.graph import discover
from gfprune_cli.structure.groups import ChannelGroup, select
from gfprune_cli.structure.native import native_allocation
from gfprune_cli.structure.removal import module_shapes, remove, remove_native
from gfprune_cli.structure.search import TOLERANCE, Search, step_scores
from gfprune_cli.structure.steps import narrows_a_head

pytestmark = pytest.mark.matrix(3)

Kept = dict[str, torch.Tensor]

EXACT = 1e-9  # relative, in float64: rounding of one forward pass, amplified by the norms
each_network = pytest.mark.parametrize("name", NETWORKS)
few = settings(max_examples=3, derandomize=True, phases=[Phase.generate])  # shrinking is slow
any_pruning = given(
    seed=st.integers(0, 10**6),
    sparsity=st.floats(0.02, 0.9),
    budget=st.sampled_from(("both", "params", "macs")),
)


def meta(name: str) -> Any:
    with torch.device("meta"):
        return UNet2DModel(**NETWORKS[name])


def choose(name: str, seed: int, sparsity: float, budget: str = "params") -> Kept:
    """Units kept at random scores, by group name: the nearest reachable to a sparsity."""
    groups, _, cost = structure(name)
    scores = random_scores(groups, seed)
    widths = allocate(cost, scores, sparsity, budget=budget, strict=False).kept
    return {group.name: select(group, scores[group.name], widths[group.name]) for group in groups}


def channels_kept(groups: tuple[ChannelGroup, ...], kept: Kept) -> dict[str, int]:
    return {group.name: int(kept[group.name].sum()) * group.unit_size for group in groups}


def shares_removed(cost: CostModel, kept: Mapping[str, int], budget: str) -> dict[str, float]:
    """Of everything that a budget counts, the share that goes."""
    return {key: 1 - cost.total(kept, key) / cost.total({}, key) for key in counted(budget)}


def pruned_meta(name: str, kept: Kept) -> Any:
    """The pruned network without weights."""
    return remove(meta(name), structure(name)[0], kept)


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def forward(model: nn.Module, made: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        output: torch.Tensor = model(**made, return_dict=False)[0]
    return output


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def masked_forward(model: nn.Module, groups: tuple[ChannelGroup, ...], kept: Kept, made: Any) -> torch.Tensor:
    """Output at binary masks; replaces the norms of `model`."""
    masked = MaskedModel(model, groups, {name: alive.float() for name, alive in kept.items()})
    with torch.no_grad():
        return masked.forward(masked.passing(), made["sample"], made["timestep"], made.get("class_labels"))


def count_macs(model: nn.Module) -> int:
    """Multiply-accumulates of one sample, counted from what passes through each layer."""
    total = 0

    def convolution(module: Any, args: Any, output: torch.Tensor) -> None:
        nonlocal total
        total += output.numel() * module.weight[0].numel()

    def linear(module: Any, args: Any, output: torch.Tensor) -> None:
        nonlocal total
        total += output.numel() * args[0].shape[-1]

    def attention(module: Any, args: Any, output: torch.Tensor) -> None:
        nonlocal total
        tokens = args[0].shape[-2] * args[0].shape[-1]
        head = module.to_q.weight.shape[0] // module.heads
        queries_by_keys = weights_by_values = module.heads * tokens * tokens * head
        total += queries_by_keys + weights_by_values

    hooks = []
    for module in model.modules():
        for kind, hook in ((nn.Conv2d, convolution), (nn.Linear, linear), (Attention, attention)):
            if isinstance(module, kind):
                hooks.append(module.register_forward_hook(hook))
    forward(model, example_inputs(model))
    for handle in hooks:
        handle.remove()
    return total


@pytest.mark.parametrize(("size", "fits"), [(8, True), ((8, 12), True), (10, False), ((8, 6), False)])
def test_a_size_that_the_stages_cannot_halve_is_named(size: Any, fits: bool) -> None:
    """diffusers' own network fails on it, in the middle of its upsampling, with a message about tensors."""
    blocks = {"down_block_types": ("DownBlock2D",) * 3, "up_block_types": ("UpBlock2D",) * 3}
    config = {**NETWORKS["ddpm"], **blocks, "block_out_channels": (8, 8, 8), "sample_size": size}
    with torch.device("meta"):
        model = UNet2DModel(**config)
    with nullcontext() if fits else pytest.raises(GfpruneError, match=r"'sample_size' .* no multiple of 4"):
        example_inputs(model)


# --- costs ---------------------------------------------------------------------------------------


@each_network
def test_dense_costs_are_the_real_ones(name: str) -> None:
    """The cost model counts every parameter, and the MACs that forward hooks see."""
    _, _, cost = structure(name)
    model = build(name)
    assert cost.params({}) == parameters(model)
    assert cost.macs({}) == count_macs(model)


@each_network
@few
@any_pruning
def test_predicted_costs_are_those_of_the_pruned_network(
    name: str, seed: int, sparsity: float, budget: str
) -> None:
    """Parameters and MACs that the plan promises are those of the network that removal builds."""
    groups, _, cost = structure(name)
    kept = choose(name, seed, sparsity, budget)
    widths = channels_kept(groups, kept)
    pruned = pruned_meta(name, kept)
    assert cost.params(widths) == parameters(pruned)
    zeros = {key: torch.zeros_like(tensor, device="cpu") for key, tensor in pruned.state_dict().items()}
    pruned.load_state_dict(zeros, assign=True)
    assert cost.macs(widths) == count_macs(pruned)


@each_network
def test_cost_of_a_group_is_what_its_layers_cost(name: str) -> None:
    """Narrowing one group changes the total by exactly the change of the layers that it touches."""
    groups, _, cost = structure(name)
    counted: tuple[str, ...] = ("params", "macs")
    for group in groups:
        widths = {group.name: group.channels - group.step}
        for key in counted:
            saved = cost.total({}, key) - cost.total(widths, key)
            before, after = cost.removed({}), cost.removed(widths)
            assert saved == cost.of_group(group.name, before, key) - cost.of_group(group.name, after, key)
            assert saved > 0


# --- shapes --------------------------------------------------------------------------------------


@each_network
@few
@any_pruning
def test_every_width_kept_beside_the_weights_is_right(
    name: str, seed: int, sparsity: float, budget: str
) -> None:
    """Sizes that torch and diffusers store as attributes follow the weights."""
    pruned = pruned_meta(name, choose(name, seed, sparsity, budget))
    for module_name, module in pruned.named_modules():
        kind: Any = module
        if isinstance(module, nn.Conv2d):
            assert module.weight.shape[:2] == (module.out_channels, module.in_channels), module_name
        elif isinstance(module, nn.Linear):
            assert module.weight.shape == (module.out_features, module.in_features), module_name
        elif isinstance(module, nn.GroupNorm | UnevenGroupNorm):
            assert module.weight.shape == module.bias.shape == (module.num_channels,), module_name
        elif isinstance(module, nn.Embedding):
            assert module.weight.shape == (module.num_embeddings, module.embedding_dim), module_name
        elif isinstance(module, Attention):
            check_attention(kind)
        elif type(module).__name__ in ("Downsample2D", "Upsample2D") and isinstance(
            getattr(module, "conv", None), nn.Conv2d
        ):
            assert (kind.channels, kind.out_channels) == (kind.conv.in_channels, kind.conv.out_channels)
        elif type(module).__name__ == "ResnetBlock2D":
            assert (kind.in_channels, kind.out_channels) == (
                kind.norm1.num_channels,
                kind.conv2.out_channels,
            )
            for sampler in (kind.upsample, kind.downsample):
                if hasattr(sampler, "channels"):
                    assert sampler.channels == sampler.out_channels == kind.in_channels, module_name


def check_attention(attention: Any) -> None:
    inner = attention.to_q.out_features
    assert inner == attention.to_k.out_features == attention.to_v.out_features
    assert inner == attention.to_out[0].in_features == attention.inner_dim == attention.inner_kv_dim
    assert attention.heads == attention.sliceable_head_dim
    assert inner % attention.heads == 0
    assert attention.query_dim == attention.cross_attention_dim == attention.to_q.in_features
    assert attention.out_dim == attention.to_out[0].out_features


@each_network
@few
@any_pruning
def test_the_outside_of_the_network_stays(name: str, seed: int, sparsity: float, budget: str) -> None:
    """Input channels, output channels, time features and class vectors keep their width and weights."""
    dense, pruned = meta(name), pruned_meta(name, choose(name, seed, sparsity, budget))
    assert pruned.conv_in.in_channels == dense.conv_in.in_channels
    assert pruned.conv_out.out_channels == dense.conv_out.out_channels
    assert pruned.time_embedding.linear_1.in_features == dense.time_embedding.linear_1.in_features
    for key, tensor in dense.time_proj.state_dict().items():
        assert pruned.time_proj.state_dict()[key].shape == tensor.shape
    if dense.config.class_embed_type == "identity":
        assert pruned.time_embedding.linear_2.out_features == dense.time_embedding.linear_2.out_features
    if dense.config.class_embed_type == "timestep":
        assert pruned.class_embedding.linear_1.in_features == dense.class_embedding.linear_1.in_features
    if dense.config.num_class_embeds is not None:
        assert pruned.class_embedding.num_embeddings == dense.class_embedding.num_embeddings
    for module_name, module in dense.named_modules():
        if module_name.startswith("up_blocks") and module_name.endswith("skip_conv"):
            assert pruned.get_submodule(module_name).out_channels == module.out_channels == 3


# --- exactness -----------------------------------------------------------------------------------


@each_network
@few
@any_pruning
def test_removal_is_exact(name: str, seed: int, sparsity: float, budget: str) -> None:
    """The narrow network computes what the masked one computes, to float64 rounding, for any selection."""
    groups, _, _ = structure(name)
    kept = choose(name, seed, sparsity, budget)
    model = build(name, seed, torch.float64)
    made = inputs(model, seed)
    pruned = class_labels_in_its_dtype(remove(model, groups, kept))
    dense = forward(model, made)
    found = forward(pruned, made)
    expected = masked_forward(model, groups, kept, made)
    assert relative_error(found, expected) < EXACT
    if not all(bool(alive.all()) for alive in kept.values()):
        assert relative_error(dense, expected) > 1e-3  # the selection matters at all


@each_network
def test_removal_is_exact_for_any_binary_mask(name: str) -> None:
    """Exactness does not rest on equal counts inside norm groups: any mask that leaves one unit is exact."""
    groups, _, _ = structure(name)
    source = torch.Generator().manual_seed(5)
    kept = {group.name: torch.rand(group.units, generator=source) < 0.5 for group in groups}
    for group in groups:
        kept[group.name][int(torch.randint(group.units, (), generator=source))] = True
    model = build(name, 5, torch.float64)
    made = inputs(model)
    pruned = class_labels_in_its_dtype(remove(model, groups, kept))
    found = forward(pruned, made)
    assert relative_error(found, masked_forward(model, groups, kept, made)) < EXACT


@each_network
def test_keeping_everything_changes_nothing(name: str) -> None:
    """Full masks and an empty removal both give the dense network, bit for bit."""
    groups, _, _ = structure(name)
    kept = {group.name: torch.ones(group.units, dtype=torch.bool) for group in groups}
    model = build(name)
    made = inputs(model)
    dense = forward(model, made)
    pruned: Any = remove(model, groups, kept)
    assert type(pruned) is pruned_class(type(model).__name__)
    assert torch.equal(forward(pruned, made), dense)
    assert torch.equal(masked_forward(model, groups, kept, made), dense)


@pytest.mark.parametrize("name", ["ddpm", "seams"])
def test_plain_norms_would_not_be_exact(name: str) -> None:
    """The mask-aware norms are what makes removal exact: statistics over zeroed channels shift the output."""
    groups, _, _ = structure(name)
    kept = choose(name, 0, 0.5)
    model = build(name, 0, torch.float64)
    made = inputs(model)
    pruned = forward(remove(model, groups, kept), made)
    masked = MaskedModel(model, groups, {key: alive.float() for key, alive in kept.items()})
    arguments = (dict(masked.passing()), made["sample"], made["timestep"], None)
    with torch.no_grad():
        with plain_norms(masked):
            assert relative_error(masked.forward(*arguments), pruned) > 1e-3
        assert relative_error(masked.forward(*arguments), pruned) < EXACT  # and the masks are back


@pytest.mark.parametrize("name", ["ddpm", "single-head"])
def test_pruned_attention_is_exact_under_every_processor(name: str) -> None:
    """The scale stored beside the weights follows the head: the plain attention processor agrees too."""
    groups, _, _ = structure(name)
    kept = choose(name, 3, 0.5)
    model = build(name, 3, torch.float64)
    made = inputs(model)
    pruned = remove(model, groups, kept)
    fused = forward(pruned, made)
    for module in pruned.modules():
        if isinstance(module, Attention):
            module.set_processor(AttnProcessor())
    assert relative_error(forward(pruned, made), fused) < 1e-6  # its softmax is taken in float32


def test_weights_of_the_source_are_left_alone() -> None:
    """Removal copies: the dense network computes the same afterwards and shares no memory."""
    groups, _, _ = structure("ddpm")
    model = build("ddpm")
    made = inputs(model)
    before = forward(model, made)
    pruned = remove(model, groups, choose("ddpm", 1, 0.5))
    with torch.no_grad():
        for parameter in pruned.parameters():
            parameter.zero_()
    assert torch.equal(forward(model, made), before)


def test_discover_leaves_the_network_as_it_was() -> None:
    """Tracing neither keeps hooks, nor gradients, nor changes which parameters require them."""
    model = build("ddpm")
    model.conv_in.weight.requires_grad_(True)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    discover(model)
    assert [p.requires_grad for p in model.parameters()].count(True) == 1
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(not module._forward_hooks for module in model.modules())
    assert all(torch.equal(state[key], tensor) for key, tensor in model.state_dict().items())


def described(name: str) -> str:
    """Everything about the groups of a network, in the order in which runs see it."""
    lines = []
    for group in structure(name)[0]:
        lines.append(f"{group.name} {group.unit_size} {group.cells.tolist()}")
        for m in group.members:
            lines.append(f"{m.module} {m.side} {m.positions.tolist()} {m.channels.tolist()}")
    return "\n".join(lines)


@pytest.mark.thorough  # so are whole runs: reliability/test_determinism.py
@pytest.mark.slow
def test_structure_is_the_same_in_every_process() -> None:
    """Groups, cells and the order of members are a function of the network: a resumed run sums in that order.

    Objects lie at other addresses in another process; nothing may follow their order.
    """
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    code = "block = bytearray(70_000); from test_structure import described; print(described('seams'))"
    other = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "1"},
        capture_output=True,
        check=True,
        text=True,
        timeout=120,
    )
    assert other.stdout.strip() == described("seams")


# --- norms ---------------------------------------------------------------------------------------


@each_network
@few
@any_pruning
def test_cells_keep_equal_counts(name: str, seed: int, sparsity: float, budget: str) -> None:
    """Every cell of a group keeps the same number of units, and at least one."""
    groups, _, _ = structure(name)
    kept = choose(name, seed, sparsity, budget)
    for group in groups:
        assert torch.equal(group.cells.flatten().sort().values, torch.arange(group.units))
        counts = kept[group.name][group.cells].sum(1)
        assert len(counts.unique()) == 1, group.name
        assert int(counts[0]) >= 1


@each_network
@few
@any_pruning
def test_norms_stay_plain_except_at_seams(name: str, seed: int, sparsity: float, budget: str) -> None:
    """`UnevenGroupNorm` appears only under a skip connection, where two tensors meet in one norm."""
    groups, _, _ = structure(name)
    kept = choose(name, seed, sparsity, budget)
    pruned = pruned_meta(name, kept)
    sources = {
        module_name: sum(any(m.module == module_name for m in group.members) for group in groups)
        for module_name, module in pruned.named_modules()
        if isinstance(module, nn.GroupNorm | UnevenGroupNorm)
    }
    stock = meta(name)
    for module_name, count in sources.items():
        norm, dense = pruned.get_submodule(module_name), stock.get_submodule(module_name)
        if isinstance(norm, UnevenGroupNorm):
            assert count > 1, module_name
            assert len(set(norm.group_sizes)) > 1, "a plain norm would do"
        elif count == 1 and dense.num_channels // dense.num_groups > 1:
            assert norm.num_groups == dense.num_groups, module_name
    assert any(count > 1 for count in sources.values())


@each_network
def test_seams_are_exercised(name: str) -> None:
    """The networks of this file do have norms that straddle seams: their exactness means something."""
    kept = choose(name, 0, 0.4)
    uneven = [m for m in pruned_meta(name, kept).modules() if isinstance(m, UnevenGroupNorm)]
    assert uneven


@settings(max_examples=50, derandomize=True)
@given(data=st.data(), sizes=st.lists(st.integers(1, 5), min_size=1, max_size=6))
def test_uneven_norm_normalises_each_group_by_itself(data: st.DataObject, sizes: list[int]) -> None:
    """Each group of an uneven norm is what `nn.GroupNorm` with one group makes of its channels."""
    source = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    weight, bias, x = (
        torch.randn(shape, generator=source, dtype=torch.float64)
        for shape in ((sum(sizes),), (sum(sizes),), (2, sum(sizes), 3, 3))
    )
    norm = UnevenGroupNorm(sizes, 1e-5, weight, bias)
    parts = [
        nn.functional.group_norm(part, 1, w, b, 1e-5)
        for part, w, b in zip(x.split(sizes, 1), weight.split(sizes), bias.split(sizes), strict=True)
    ]
    torch.testing.assert_close(norm(x), torch.cat(parts, 1), rtol=1e-10, atol=1e-10)
    assert norm(x.bfloat16()).dtype == torch.bfloat16


# --- native layout -------------------------------------------------------------------------------


@each_network
@pytest.mark.parametrize("budget", ["both", "params", "macs"])
def test_native_results_load_in_the_stock_class(name: str, budget: str) -> None:
    """The native layout is a plain `UNet2DModel` of the promised size, with the norm groups of its config."""
    groups, _, cost = structure(name)
    model = build(name)
    made = inputs(model)
    allocation, config = native_allocation(model, cost, 0.4, budget)
    assert shares_removed(cost, allocation.kept, budget) == dict(allocation.sparsities)
    assert allocation.sparsity == min(allocation.sparsities.values())
    scores = random_scores(groups, 1)
    kept = {g.name: select(g, scores[g.name], allocation.kept[g.name]) for g in groups}
    native: Any = remove_native(model, groups, kept, config)
    assert type(native) is UNet2DModel
    assert parameters(native) == cost.params(allocation.kept)
    assert config["block_out_channels"][0] == model.config.block_out_channels[0]
    assert native.config.block_out_channels == config["block_out_channels"]

    fresh = UNet2DModel(**{key: value for key, value in native.config.items() if not key.startswith("_")})
    fresh.load_state_dict(native.state_dict(), strict=True)
    assert relative_error(forward(fresh.eval(), made), forward(native, made)) < 1e-5  # float32
    for module_name, norm in fresh.named_modules():
        if isinstance(norm, nn.GroupNorm):
            found = native.get_submodule(module_name)
            assert (found.num_groups, found.num_channels) == (norm.num_groups, norm.num_channels)

    adaptive = remove(model, groups, kept).state_dict()
    assert all(torch.equal(tensor, adaptive[key]) for key, tensor in native.state_dict().items())


@pytest.mark.parametrize("name", ["ddpm", "seams", "scale-shift", "learned-time"])
def test_native_allocation_shrinks(name: str) -> None:
    """Networks whose stages differ in width can be expressed narrower by the stock class."""
    _, _, cost = structure(name)
    allocation, _ = native_allocation(meta(name), cost, 0.3, "params")
    assert allocation.sparsity > 0


# --- budget --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def middling() -> CostModel:
    """A network of middle size, without weights."""
    with torch.device("meta"):
        model = UNet2DModel(
            sample_size=16,
            block_out_channels=(32, 48, 80, 72),
            norm_num_groups=8,
            attention_head_dim=8,
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        )
    groups, trace = discover(model)
    return CostModel(model, groups, trace)


@pytest.mark.parametrize("budget", ["both", "params", "macs"])
@pytest.mark.parametrize("sparsity", [0.2, 0.3, 0.44, 0.5, 0.7])
@pytest.mark.parametrize("align", [1, 8])
def test_sparsity_is_met_within_one_point(
    middling: CostModel, sparsity: float, budget: str, align: int
) -> None:
    """At least what was asked for goes of everything that is counted, of one cost at most 0.01 more."""
    scores = random_scores(tuple(middling.groups.values()), 7)
    allocation = allocate(middling, scores, sparsity, budget=budget, align=align)
    assert 0 <= allocation.sparsity - sparsity <= TOLERANCE
    assert allocation.sparsities == shares_removed(middling, allocation.kept, budget)
    assert allocation.sparsity == min(allocation.sparsities.values())
    for name, group in middling.groups.items():
        assert 0 < allocation.kept[name] <= group.channels
        assert allocation.kept[name] % group.step == 0


@each_network
@settings(max_examples=5, derandomize=True, phases=[Phase.generate])
@given(
    seed=st.integers(0, 10**6),
    sparsity=st.floats(0.05, 0.85),
    budget=st.sampled_from(("both", "both", "params", "macs")),
    align=st.sampled_from((1, 1, 4)),
    skewed=st.booleans(),
)
def test_a_budget_is_met_or_the_nearest_is_named(
    name: str, seed: int, sparsity: float, budget: str, align: int, skewed: bool
) -> None:
    """Whatever the scores, also where groups differ by orders of magnitude; following the advice works."""
    groups, _, cost = structure(name)
    scores = random_scores(groups, seed)
    if skewed:
        factors = 10 ** (6 * torch.rand(len(groups), generator=torch.Generator().manual_seed(seed)) - 3)
        scores = {key: scores[key] * factor for key, factor in zip(scores, factors, strict=True)}
    try:
        found = allocate(cost, scores, sparsity, budget=budget, align=align)
    except UsageError as error:
        nearest = advised(error)
        assert not sparsity <= nearest <= sparsity + TOLERANCE - 1e-3
        sparsity, found = nearest, allocate(cost, scores, nearest, budget=budget, align=align)
    removed = shares_removed(cost, found.kept, budget)
    assert found.sparsities == removed
    assert 0 <= min(removed.values()) - sparsity <= TOLERANCE


@pytest.mark.parametrize("binding", ["params", "macs"])
def test_a_budget_of_both_holds_where_one_cost_alone_binds(
    middling: CostModel, binding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What spares little of one cost is worthless, so that the other has long been met."""
    other: str = "macs" if binding == "params" else "params"
    removed = middling.removed({})

    def saves(name: str, key: str) -> float:
        narrow = removed | {name: middling.groups[name].step}
        saved = middling.of_group(name, removed, key) - middling.of_group(name, narrow, key)
        return saved / middling.total({}, key)

    cheap = {name for name in middling.groups if saves(name, other) > 2 * saves(name, binding)}
    assert 0 < len(cheap) < len(middling.groups)
    scores = {
        name: torch.full((group.units,), 1e-9 if name in cheap else 1.0)
        for name, group in middling.groups.items()
    }
    monkeypatch.setattr(budgets, "FLOORS", (0.5, 0.0))  # widths may differ as much as the prices say
    found = allocate(middling, scores, 0.5)
    assert 0 <= found.sparsities[binding] - 0.5 <= TOLERANCE
    assert found.sparsities[other] > 0.55


@pytest.mark.parametrize("name", ["seams", "single-head", "ncsnpp", "scale-shift"])
@pytest.mark.parametrize("sparsity", [0.2, 0.4, 0.6])
def test_both_costs_at_once_lose_no_more_than_the_price_of_one(name: str, sparsity: float) -> None:
    """At the same two limits; with prices in between less is lost on the whole."""
    groups, _, cost = structure(name)
    lost: list[float] = []
    for seed in range(4):
        scores = {key: values**3 for key, values in random_scores(groups, seed).items()}
        search = Search(cost, scores, dict.fromkeys(BOTH, 1 - sparsity), 1, 0.5 * (1 - sparsity) ** 0.5)
        found = search.cheapest(strict=True)
        singles = [search.landed({"params": end, "macs": 1 - end}, strict=True) for end in (0.0, 1.0)]
        reached = [search.lost(single.kept) for single in singles if single.sparsity >= sparsity]
        if found.sparsity >= sparsity and reached:
            assert search.lost(found.kept) <= min(reached)
            lost.append(search.lost(found.kept) / min(reached))
    assert lost
    assert sum(lost) < len(lost)


@pytest.mark.parametrize("align", [8, 16])
def test_alignment_is_kept_where_it_fits_and_halved_elsewhere(middling: CostModel, align: int) -> None:
    scores = random_scores(tuple(middling.groups.values()), 7)
    kept = allocate(middling, scores, 0.5, budget="macs", align=align).kept
    narrowed = 0
    for name, group in middling.groups.items():
        fitting = [math.lcm(group.step, multiple) for multiple in (16, 8, 4, 2) if multiple <= align]
        fitting = [step for step in fitting if group.channels % step == 0 and group.channels >= 2 * step]
        assert kept[name] % max(fitting, default=group.step) == 0
        narrowed += kept[name] < group.channels
    assert narrowed > 5


@pytest.mark.parametrize(("align", "multiple"), [(4, 8), (1, 1)])
def test_a_head_that_narrows_keeps_a_multiple_of_eight_unless_asked_otherwise(
    align: int, multiple: int
) -> None:
    with torch.device("meta"):
        model = UNet2DModel(
            sample_size=16,
            block_out_channels=(32, 96),
            norm_num_groups=8,
            attention_head_dim=None,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )
    groups, trace = discover(model)
    cost = CostModel(model, groups, trace)
    scores = random_scores(groups, 3)
    kept = allocate(cost, scores, 0.5, align=align).kept
    heads = [kept[group.name] for group in groups if narrows_a_head(group)]
    assert len(heads) > 2
    assert min(heads) < 96
    assert all(width % multiple == 0 for width in heads)
    assert multiple > 1 or any(width % 8 for width in heads)


def advised(error: UsageError) -> float:
    """The sparsity that a message says can be reached."""
    found = re.search(r"the nearest is (\d\.\d+)", str(error))
    assert found is not None
    return float(found[1])


@each_network
@pytest.mark.parametrize("budget", ["both", "params", "macs"])
def test_an_unreachable_budget_names_a_reachable_one(name: str, budget: str) -> None:
    """The error is a usage error, says what goes of each cost, and following its advice works."""
    groups, _, cost = structure(name)
    scores = random_scores(groups, 0)
    with pytest.raises(UsageError, match=rf"0\.999 of {budget} cannot be reached") as caught:
        allocate(cost, scores, 0.999, budget=budget)
    named = re.findall(r"(\d\.\d{3}) of (params|macs)[,)]", str(caught.value))
    assert [key for _, key in named] == (["params", "macs"] if budget == "both" else [])
    advice = advised(caught.value)
    assert 0.5 < advice < 0.999
    if named:
        assert advice == pytest.approx(min(float(share) for share, _ in named), abs=1.5e-3)
    assert 0 <= allocate(cost, scores, advice, budget=budget).sparsity - advice <= TOLERANCE


def test_lowest_score_per_saving_goes_first() -> None:
    """A group whose units score next to nothing is the first to be narrowed, down to its floor."""
    groups, _, cost = structure("ddpm")
    scores = {group.name: torch.ones(group.units) for group in groups}
    worthless = max(groups, key=lambda group: cost.of_group(group.name, cost.removed({}), "params")).name
    scores[worthless] *= 1e-6
    kept = allocate(cost, scores, 0.05, strict=False).kept
    share = {group.name: kept[group.name] / group.channels for group in groups}
    assert share[worthless] < 1
    assert min(share, key=lambda name: share[name]) == worthless


# --- selection -----------------------------------------------------------------------------------


def toy_group(cells: int, per_cell: int, unit_size: int) -> ChannelGroup:
    units = torch.arange(cells * per_cell)
    interleaved = units.view(per_cell, cells).T.contiguous()  # neighbours lie in different cells
    return ChannelGroup("toy", cells * per_cell * unit_size, unit_size, interleaved, ())


@settings(max_examples=100, derandomize=True)
@given(
    cells=st.integers(1, 4),
    per_cell=st.integers(1, 5),
    unit_size=st.integers(1, 3),
    data=st.data(),
)
def test_select_keeps_the_best_of_each_cell(
    cells: int, per_cell: int, unit_size: int, data: st.DataObject
) -> None:
    """As many units as asked for; none left behind in a cell beats one kept; ties fall to the lower index."""
    group = toy_group(cells, per_cell, unit_size)
    ranks = st.lists(st.integers(0, 3), min_size=group.units, max_size=group.units)  # many ties
    scores = torch.tensor(data.draw(ranks)).float()
    units = data.draw(st.integers(0, group.units))
    kept = select(group, scores, units * unit_size)
    assert int(kept.sum()) == units
    assert torch.equal(kept, select(group, scores, units * unit_size))
    counts = kept[group.cells].sum(1)
    assert int(counts.max() - counts.min()) <= 1
    for cell in group.cells:
        inside = [(-float(scores[u]), int(u)) for u in cell if kept[u]]
        outside = [(-float(scores[u]), int(u)) for u in cell if not kept[u]]
        if inside and outside:
            assert max(inside) < min(outside)
    assert len(group.kept_channels(kept)) == units * unit_size


@settings(max_examples=50, derandomize=True)
@given(cells=st.integers(1, 4), per_cell=st.integers(1, 5), seed=st.integers(0, 1000))
def test_step_scores_are_what_selection_gives_up(cells: int, per_cell: int, seed: int) -> None:
    """The price list of a group agrees with what `select` removes, step by step."""
    group = toy_group(cells, per_cell, 1)
    scores = torch.rand(group.units, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    prices = step_scores(group, scores)
    assert len(prices) == per_cell
    for steps in range(per_cell + 1):
        kept = select(group, scores, group.channels - steps * group.step)
        assert float(scores[~kept].sum()) == pytest.approx(sum(prices[:steps]))


def test_selection_is_narrower_for_a_tighter_budget() -> None:
    """With the same scores a tighter budget keeps a subset, so that masks do not turn round on the way."""
    groups, _, _ = structure("seams")
    for group in groups:
        scores = random_scores(groups, 4)[group.name]
        wide = select(group, scores, group.channels - group.step)
        narrow = select(group, scores, max(group.step, group.channels - 2 * group.step))
        assert not bool((narrow & ~wide).any())


def test_shapes_of_the_configuration_are_plain_json() -> None:
    """The configuration entry holds names, integers and lists only, and rebuilds the same shapes."""
    groups, _, _ = structure("seams")
    kept = choose("seams", 2, 0.5)
    model = build("seams")
    pruned: Any = remove(model, groups, kept)
    modules = pruned.config.gfprune["modules"]
    for shape in modules.values():
        for value in shape.values():
            assert isinstance(value, int) or all(isinstance(size, int) for size in value)
    again = pruned_class("UNet2DModel").from_config(pruned.config)
    assert {key: tensor.shape for key, tensor in again.state_dict().items()} == {
        key: tensor.shape for key, tensor in pruned.state_dict().items()
    }
    assert module_shapes(model, {}) == {}


def test_an_uneven_norm_does_not_break_a_compiled_graph() -> None:
    """It is compiled once, and one graph serves norms of other sizes: what they are made of it is given."""
    norms = [
        UnevenGroupNorm(sizes, 1e-5, torch.randn(8), torch.randn(8)).requires_grad_(False)
        for sizes in ([3, 1, 4], [1, 3, 4])
    ]
    x = torch.randn(2, 8, 4, 4)
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _inputs: object) -> object:
        graphs.append(graph)
        return graph.forward

    def called(norm: UnevenGroupNorm, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = norm(x)
        return found

    compiled = torch.compile(called, backend=backend, fullgraph=True)  # type: ignore[call-overload]
    for norm in (*norms, norms[0]):
        assert torch.allclose(compiled(norm, x), norm(x), atol=1e-5)
    assert len(graphs) == 1
    made = [node.target for node in graphs[0].graph.nodes if node.target in (torch.tensor, torch.arange)]
    assert not made, "a CUDA graph holds no copy from the host"
    torch.compiler.reset()


def test_an_uneven_norm_can_be_trained_after_it_was_used_in_inference_mode() -> None:
    norm = UnevenGroupNorm([3, 1, 4], 1e-5, torch.randn(8), torch.randn(8))
    x = torch.randn(2, 8, 4, 4)
    with torch.inference_mode():
        seen = norm(x)
    norm(x).square().sum().backward()
    assert norm.weight.grad is not None
    assert torch.allclose(seen, norm(x), atol=1e-5)
