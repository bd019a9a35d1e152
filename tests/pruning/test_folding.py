"""Modulation folding: which layers are found, what they become, and that a missed tolerance stops the run."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import networks
import pytest
import torch
import transformers_zoo as zoo
from torch import nn
from twins import assert_same

import gfprune_cli
from gfprune_cli.checkpoint.modeling.gfprune_models_v2 import FactoredLinear, refuse_misfits
from gfprune_cli.checkpoint.shards import write_weights
from gfprune_cli.diffusion.conditions import Conditions
from gfprune_cli.diffusion.draws import Draws, generator
from gfprune_cli.diffusion.schedulers import noising_process
from gfprune_cli.errors import GfpruneError
from gfprune_cli.flow.folding import Factors, Samples, break_even, factors, fold, output_basis, relative_error
from gfprune_cli.progress import silent
from gfprune_cli.pruning import fold as pruning_fold
from gfprune_cli.pruning.fold import Folder, factored
from gfprune_cli.pruning.plan import FOLD, tolerance_of
from gfprune_cli.pruning.probes import Probes, pool_of
from gfprune_cli.pruning.verify import check_removal
from gfprune_cli.recipes.prune import PruneRecipe
from gfprune_cli.runtime.half import as_stored, keep_in_half
from gfprune_cli.runtime.memory import Alive
from gfprune_cli.structure import modulation
from gfprune_cli.structure.budget import allocate
from gfprune_cli.structure.cost import CostModel
from gfprune_cli.structure.graph import discover
from gfprune_cli.structure.modulation import feeders, modulation_layers
from gfprune_cli.structure.removal import remove
from gfprune_cli.structure.search import Allocation

# Transformer -> endings of the layers that see no token, by the published code; all others do.
EMBEDDERS = ("embedder.linear_1", "embedder.linear_2")
NORMS = ("norm1.linear", "norm1_context.linear", "norm_out.linear")
MODULATION = {
    "dit": (*EMBEDDERS, "norm1.linear", "proj_out_1"),
    "pixart": (*EMBEDDERS, "adaln_single.linear"),
    "sd3": (*EMBEDDERS, *NORMS),
    "flux": (*EMBEDDERS, *NORMS, "norm.linear"),
    "sana": (*EMBEDDERS, "time_embed.linear"),
    "cogvideox": ("embedding.linear_1", "embedding.linear_2", "norm2.linear", *NORMS),
    "wan": ("time_embedder.linear_1", "time_embedder.linear_2", "time_proj"),
    "ltx": (*EMBEDDERS, "time_embed.linear"),
    "stable-audio": ("timestep_proj.0", "timestep_proj.2"),
    "AuraFlowTransformer2DModel": ("step_proj.linear_1", "step_proj.linear_2", *NORMS),
    "HunyuanVideoTransformer3DModel": (*EMBEDDERS, *NORMS, "norm.linear"),
    "QwenImageTransformer2DModel": (*EMBEDDERS, "img_mod.1", "txt_mod.1", "norm_out.linear"),
}
# They read text, or sizes two at a time.
READ_TOKENS = ("context_embedder.time_text_embed.text_embedder", "refiner_blocks", "resolution_embedder")


def found_in(model: Any, given: dict[str, Any]) -> list[str]:
    """Layers found with the first argument and everything with tokens hidden."""
    sample = next(iter(given))

    def run(hide: Any) -> None:
        hidden = {
            name: hide(value)
            if name == sample or (isinstance(value, torch.Tensor) and value.ndim > 2)
            else value
            for name, value in given.items()
        }
        model(**hidden, return_dict=False)

    return list(modulation_layers(model, run, len(given[sample])).inputs)


def linear_names(model: nn.Module, endings: tuple[str, ...]) -> set[str]:
    return {
        name for name, part in model.named_modules() if type(part) is nn.Linear and name.endswith(endings)
    }


@pytest.mark.parametrize("name", networks.NETWORKS)
def test_layers_of_unets_are_found_by_what_they_read(name: str) -> None:
    model = networks.build(name)
    expected = linear_names(model, ("time_emb_proj",))
    expected |= {part for part in linear_names(model, ("linear_1", "linear_2")) if "embedding" in part}
    assert set(found_in(model, networks.inputs(model))) == expected


@pytest.mark.parametrize("name", MODULATION)
def test_layers_of_transformers_are_found_by_what_they_read(name: str) -> None:
    if name in zoo.OTHERS:
        model, given = zoo.build_other(name)
    else:
        model, given = zoo.build(name), zoo.inputs(zoo.build(name))
    model = model.float()
    given = {key: value.float() if is_float(value) else value for key, value in given.items()}
    found = set(found_in(model, given))
    expected = linear_names(model, MODULATION[name])
    assert found == {part for part in expected if not any(text in part for text in READ_TOKENS)}
    first, other = inputs_seen(model, given, found), inputs_seen(model, changed(given), found)
    assert all(torch.equal(first[layer], other[layer]) for layer in found)  # none is moved by sample or text


def is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def changed(given: dict[str, Any]) -> dict[str, Any]:
    sample = next(iter(given))
    return {
        name: value + 1 if (name == sample or (is_float(value) and value.ndim > 2)) else value
        for name, value in given.items()
    }


def inputs_seen(model: nn.Module, given: dict[str, Any], names: set[str]) -> dict[str, torch.Tensor]:
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _m, args, name=name: seen.update({name: args[0].clone()})
        )
        for name in names
    ]
    with torch.no_grad():
        model(**given, return_dict=False)
    for hook in hooks:
        hook.remove()
    return seen


def test_what_makes_the_embedding_is_told_from_what_reads_it() -> None:
    model = networks.build("ddpm")
    given = networks.inputs(model)
    names = found_in(model, given)
    before = [parameter.requires_grad for parameter in model.parameters()]
    feeding = feeders(model, lambda hide: model(hide(given["sample"]), given["timestep"]), names)
    assert feeding == {"time_embedding.linear_1", "time_embedding.linear_2"}
    assert [parameter.requires_grad for parameter in model.parameters()] == before


def test_finding_what_feeds_others_keeps_nothing_for_a_way_back() -> None:
    """Of a network held in half precision it would be all weights in float32."""
    model = keep_in_half(networks.build("ddpm").bfloat16().float(), torch.bfloat16)
    given = networks.inputs(model)
    names = found_in(model, given)

    def run(hide: Any) -> None:
        model(hide(given["sample"]), given["timestep"])

    held = [as_stored(weight) for weight in model.parameters()]
    with Alive(held) as once:
        modulation.hidden_run(run)
    with Alive(held) as taped:
        assert feeders(model, run, names)
    assert taped.most <= 1.1 * once.most


def curve(count: int, inputs: int, dimensions: int, seed: int = 0) -> torch.Tensor:
    """[count, inputs] points of a set of few dimensions, away from the origin."""
    source = torch.Generator().manual_seed(seed)
    axes = torch.randn(dimensions + 1, inputs, generator=torch.Generator().manual_seed(99))
    return axes[0] + torch.randn(count, dimensions, generator=source) @ axes[1:]


def as_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def test_the_rank_is_that_of_the_inputs_and_the_mean_lies_in_the_bias() -> None:
    layer = nn.Linear(40, 30).requires_grad_(False)
    fitted, judged = curve(60, 40, 3), curve(20, 40, 3, seed=1)
    found = fold(
        layer.weight, layer.bias, Samples(fitted, layer(fitted)), Samples(judged, layer(judged)), 1e-4, as_is
    )
    assert found is not None
    assert found.rank == 3
    assert relative_error(found(curve(50, 40, 3, seed=2)), layer(curve(50, 40, 3, seed=2))) < 1e-5


def test_the_smallest_rank_that_serves_is_chosen_on_samples_it_was_not_fitted_to() -> None:
    layer = nn.Linear(40, 30).requires_grad_(False)
    fitted, judged = curve(60, 40, 12), curve(20, 40, 12, seed=1)
    parts = Samples(fitted, layer(fitted)), Samples(judged, layer(judged))
    found = fold(layer.weight, layer.bias, *parts, 0.2, as_is)
    assert found is not None
    assert relative_error(found(judged), parts[1].y) <= 0.2
    tighter = fold(layer.weight, layer.bias, *parts, 0.02, as_is)
    assert tighter is not None
    assert found.rank < tighter.rank <= 12


@pytest.mark.parametrize(("dimensions", "tolerance"), [(39, 1e-3), (3, 1e-9)])
def test_layers_whose_rank_would_save_nothing_stay(dimensions: int, tolerance: float) -> None:
    layer = nn.Linear(40, 30).requires_grad_(False)
    parts = [Samples(x, layer(x)) for x in (curve(90, 40, dimensions), curve(20, 40, dimensions, seed=1))]
    assert fold(layer.weight, layer.bias, parts[0], parts[1], tolerance, as_is) is None


def test_break_even_counts_the_bias_that_a_layer_did_not_have() -> None:
    weight = torch.zeros(30, 40)
    for bias in (torch.zeros(30), None):
        rank = break_even(weight, bias)
        extra = 30 if bias is None else 0
        assert rank * 70 + extra < 1200 <= (rank + 1) * 70 + extra


def test_rounding_of_the_stored_type_counts_as_error() -> None:
    layer = nn.Linear(40, 30).requires_grad_(False)
    parts = [Samples(x, layer(x)) for x in (curve(60, 40, 3), curve(20, 40, 3, seed=1))]
    half = lambda tensor: tensor.bfloat16().float()  # noqa: E731
    assert fold(layer.weight, layer.bias, parts[0], parts[1], 1e-4, half) is None
    found = fold(layer.weight, layer.bias, parts[0], parts[1], 2e-2, half)
    assert found is not None
    assert all(torch.equal(half(part), part) for part in (found.first, found.second, found.bias))


def folded(model: Any, rank: int) -> Any:
    """Every layer that can be at one rank, as exactly as that allows."""
    names = list(found_in(model, networks.inputs(model)))
    chosen = {}
    for name in names:
        layer = model.get_submodule(name)
        x = torch.randn(50, layer.in_features, generator=generator(0, name))
        most = min(rank, break_even(layer.weight, layer.bias))
        samples = Samples(x, layer(x))
        chosen[name] = factors(layer.weight, output_basis(layer.weight, samples)[:, :most], samples, as_is)
    return factored(model, chosen)


@pytest.mark.parametrize("name", networks.NETWORKS)
def test_folded_networks_have_the_same_groups_and_are_pruned_exactly(name: str) -> None:
    model = networks.build(name)
    dense, _ = discover(model)
    network = folded(model, 4)
    groups, trace = discover(network)
    shapes = lambda found: [(group.name, group.channels, group.unit_size) for group in found]  # noqa: E731
    assert shapes(groups) == shapes(dense)
    cost = CostModel(network, groups, trace)
    assert cost.params({}) == sum(p.numel() for p in network.parameters())
    if name != "class-timestep":  # which diffusers cannot run in float64
        check_removal(network, groups, networks.inputs(model, count=1))


@pytest.mark.parametrize("name", ["dit", "pixart", "sana", "wan", "flux"])
def test_the_residual_width_of_a_folded_transformer_is_pruned_exactly(name: str) -> None:
    model = zoo.build(name, dtype=torch.float32)
    given = zoo.inputs(model)
    chosen = {}
    for layer in found_in(model, given):
        part = model.get_submodule(layer)
        rank = break_even(part.weight, part.bias)
        chosen[layer] = Factors(
            torch.randn(rank, part.in_features) / part.in_features**0.5,
            torch.randn(part.out_features, rank) / rank**0.5,
            torch.randn(part.out_features) / 3,
        )
    network = factored(model, chosen)
    groups, trace = discover(network, given, width=True)
    assert CostModel(network, groups, trace).params({}) == sum(p.numel() for p in network.parameters())
    check_removal(network, groups, given)


def test_folded_and_pruned_networks_come_back_from_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = folded(networks.build("resnet-classes"), 4)
    groups, _ = discover(network)
    kept = {group.name: torch.arange(group.units) % 2 == 0 for group in groups}
    narrow = remove(network, groups, kept)
    write_weights(tmp_path, narrow, None, None)
    loaded: Any = gfprune_cli.load(tmp_path)
    given = networks.inputs(loaded)
    assert_same(loaded, narrow, **given)
    assert any(isinstance(part, FactoredLinear) for part in loaded.modules())
    again = folded_again(loaded)
    (tmp_path / "again").mkdir()
    write_weights(tmp_path / "again", again, None, None)
    twice: Any = gfprune_cli.load(tmp_path / "again")
    assert_same(twice, again, **given)


def folded_again(model: Any) -> Any:
    """One plain layer of a narrow network as two, which the configuration has a shape for already."""
    name = next(
        name
        for name, part in model.named_modules()
        if type(part) is nn.Linear and name in model.config["gfprune"]["modules"] and "to_out" in name
    )
    part = model.get_submodule(name)
    rank = break_even(part.weight, part.bias)
    first, second = torch.randn(rank, part.in_features), torch.randn(part.out_features, rank)
    return factored(model, {name: Factors(first, second, torch.randn(part.out_features))})


SD3 = dict(pooled_projection_dim=16, joint_attention_dim=12)


def sd3_folder(model: Any, conditions: Conditions, tolerance: float) -> tuple[Folder, Any, Draws]:
    from diffusers import FlowMatchEulerDiscreteScheduler

    process = noising_process(FlowMatchEulerDiscreteScheduler(shift=3.0))
    images = torch.randn(20, 4, 8, 8, generator=generator(0, "images"))
    probes = Probes(process, conditions, (4, 8, 8), torch.device("cpu"), 0)
    draws = Draws(images, process.steps, 0, conditions)
    return Folder(model, probes, tolerance, torch.float32, silent), process, draws


def prompts(spread: float) -> Conditions:
    """Twenty prompts whose pooled vectors differ little; those that are held out, by `spread`."""
    source = generator(0, "prompts")
    pooled = torch.randn(1, 1, 16, generator=source) + 0.02 * torch.randn(20, 1, 16, generator=source)
    found = Conditions(
        {"encoder_hidden_states": torch.randn(20, 1, 5, 12, generator=source), "pooled_projections": pooled},
        sample="hidden_states",
        rows=tuple(range(20)),
    )
    pooled[pool_of(found, "check")] += spread * torch.randn(1, 1, 16, generator=source)
    return found


def test_a_network_with_pooled_prompts_is_folded_within_the_tolerance() -> None:
    model = zoo.build("sd3", dtype=torch.float32)
    folder, process, draws = sd3_folder(model, prompts(0), 0.05)
    result = folder.fold(process, draws)
    assert result is not None
    network, found = result
    assert found.params["after"] == sum(p.numel() for p in network.parameters()) < found.params["before"]
    assert 0 < found.layer_error <= 0.05
    assert found.covered["timesteps"][1] == 1000
    assert found.covered["pooled_projections"] == {"recorded": 20}
    # what is left as it is exists once, and how many samples go at once changes no number
    own = {tensor.data_ptr() for tensor in model.parameters()}
    assert sum(tensor.data_ptr() not in own for tensor in network.parameters()) == 3 * len(found.layers)
    folder.at_once = 1
    assert folder.output_error(network, process, draws) == pytest.approx(found.output_error, rel=1e-4)
    # what is promised of outputs holds in real passes, too
    names = {layer.name for layer in found.layers}
    batch = draws.batch("other", 3, 4)
    given: dict[str, Any] = {
        "hidden_states": batch.noise,
        "timestep": process.timesteps(batch.index),
        **{name: tensor[:, 0] for name, tensor in batch.condition.to("cpu").tensors.items()},
    }
    outputs = [outputs_seen(one, given, names) for one in (model, network)]
    for name in names:
        assert relative_error(outputs[1][name], outputs[0][name]) < 0.1


def test_samples_that_factors_are_fitted_to_span_the_widest_pooled_vector() -> None:
    """With fewer random vectors than features no basis serves prompts that were not recorded."""
    model = zoo.build("sd3", dtype=torch.float32)
    wide = prompts(0)
    wide.tensors["pooled_projections"] = torch.randn(20, 1, 2048, generator=generator(0, "wide"))
    wide.tensors["guidance"] = torch.full((20, 1), 3.5)
    counts = [sd3_folder(model, given, 0.05)[0].fitted for given in (prompts(0), wide)]
    assert counts[0] == {"fit": pruning_fold.FIT, "choose": pruning_fold.CHOOSE}
    assert counts[1]["fit"] / 2 > 2048
    drawn: Any = sd3_folder(model, wide, 0.05)[0].probes.conditions("fit", counts[1]["fit"])
    pooled = drawn.tensors["pooled_projections"][:, 0]
    assert torch.linalg.matrix_rank(pooled) == 2048
    again: Any = sd3_folder(model, wide, 0.05)[0].probes.conditions("fit", counts[1]["fit"])
    assert torch.equal(pooled, again.tensors["pooled_projections"][:, 0])


def outputs_seen(model: nn.Module, given: dict[str, Any], names: set[str]) -> dict[str, torch.Tensor]:
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda _m, _a, output, name=name: seen.update({name: output.clone()})
        )
        for name in names
    ]
    with torch.no_grad():
        model(**given, return_dict=False)
    for hook in hooks:
        hook.remove()
    return seen


def test_a_tolerance_missed_on_held_out_conditions_stops_the_run() -> None:
    folder, process, draws = sd3_folder(zoo.build("sd3", dtype=torch.float32), prompts(2.0), 0.05)
    with pytest.raises(GfpruneError, match=r"--fold 0\.05: outputs of .* held out; give more --prompts"):
        folder.fold(process, draws)


def test_labels_are_listed_and_numbers_varied() -> None:
    model = networks.build("resnet-classes")
    process = noising_process(ddpm())
    labels = torch.zeros(6, dtype=torch.long)
    probes = Probes(process, labels, (3, 8, 8), torch.device("cpu"), 0)
    folder = Folder(model, probes, 0.1, torch.float32, silent)
    folder.find()
    drawn = folder.probes.conditions("fit", 40)
    assert isinstance(drawn, torch.Tensor)
    assert set(drawn.tolist()) == set(range(5))
    assert folder.probes.ranges()["class_labels"] == {"values": 5}
    guidance = Conditions({"guidance": torch.full((4, 1), 3.5)}, rows=(0, 1, 2, 3))
    varied: Any = replace(probes, condition=guidance).conditions("fit", 200)
    values = varied.tensors["guidance"]
    assert values.min() >= 0
    assert values.max() <= 7
    assert 50 < int((values == 3.5).sum()) < 150


def ddpm() -> Any:
    from diffusers import DDPMScheduler

    return DDPMScheduler()


def test_timesteps_lie_between_levels_too_but_for_tables_of_them() -> None:
    process = noising_process(ddpm())
    probes = Probes(process, None, (3, 8, 8), torch.device("cpu"), 0)
    times = probes.timesteps("fit", 100)
    assert times[0] == 0
    assert float((times % 1 != 0).float().mean()) > 0.3
    learned = networks.build("learned-time")
    small = noising_process(ddpm().__class__(num_train_timesteps=20))
    folder = Folder(
        learned, Probes(small, None, (3, 8, 8), torch.device("cpu"), 0), 0.1, torch.float32, silent
    )
    folder.find()
    assert folder.probes.discrete
    assert not folder.probes.timesteps("fit", 50).is_floating_point()


def test_what_folding_saves_counts_in_the_budget() -> None:
    model = networks.build("ddpm")
    network = folded(model, 2)
    groups, _, dense = networks.structure("ddpm")
    narrow_groups, narrow_trace = discover(network)
    narrow = CostModel(network, narrow_groups, narrow_trace, dense)
    kept = []
    for cost, found in ((dense, groups), (narrow, narrow_groups)):
        widths = allocate(
            cost, {group.name: torch.ones(group.units) for group in found}, 0.4, budget="params"
        )
        assert 0 <= widths.sparsity - 0.4 <= 0.01
        assert cost.params(widths.kept) <= 0.6 * dense.params({})
        kept.append(sum(widths.kept.values()))
    assert kept[1] > kept[0]  # channels that need not go


@pytest.mark.parametrize(
    ("settings", "shares", "tolerance"),
    [
        (dict(budget="params"), {"params": 0.5}, FOLD),
        (dict(budget="macs"), {"macs": 0.5}, 0.0),
        (dict(), {"params": 0.5, "macs": 0.6}, FOLD),
        (dict(), {"params": 0.7, "macs": 0.5}, 0.0),  # parameters that nobody asks for
        (dict(sparsity=0), {"params": 0.0, "macs": 0.0}, FOLD),
        (dict(fold=0.0), {"params": 0.5, "macs": 0.6}, 0.0),
        (dict(fold=0.2, budget="macs"), {"macs": 0.5}, 0.2),
    ],
)
def test_transformers_are_folded_where_parameters_are_what_binds(
    settings: dict[str, Any], shares: dict[str, float], tolerance: float
) -> None:
    widths = Allocation({}, min(shares.values()), shares)
    assert tolerance_of(PruneRecipe(**settings), zoo.meta("dit"), widths) == tolerance
    if "fold" not in settings and settings.get("sparsity") != 0:  # channels narrow the modulation of U-Nets
        assert tolerance_of(PruneRecipe(**settings), networks.build("ddpm"), widths) == 0


def test_a_network_that_looks_at_its_samples_is_refused_in_one_line() -> None:
    class Looking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, sample: torch.Tensor) -> torch.Tensor:
            return self.layer(sample) if float(sample.sum()) > 0 else sample

    model = Looking()
    with pytest.raises(GfpruneError, match="cannot tell which layers see timestep and conditions alone"):
        modulation_layers(model, lambda hide: model(hide(torch.ones(2, 4))), 2)


def test_a_network_that_takes_a_batch_apart_is_given_up_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand probes one after the other would take hours."""
    monkeypatch.setattr(modulation, "OPERATIONS", 100)
    layer = nn.Linear(4, 4)

    def run(count: int) -> Any:
        return lambda hide: [layer(row) for row in hide(torch.zeros(count, 4))]

    modulation.hidden_run(run(10))
    with pytest.raises(GfpruneError, match=r"takes batches apart.*use --fold 0"):
        modulation.hidden_run(run(1000))


def test_a_lora_of_a_layer_that_is_two_now_is_refused() -> None:
    network = folded(networks.build("ddpm"), 4)
    name = "down_blocks.0.resnets.0.time_emb_proj"
    layer: Any = network.get_submodule(name)
    parts = {"lora_A": torch.zeros(2, layer.in_features), "lora_B": torch.zeros(layer.out_features, 2)}
    with pytest.raises(ValueError, match=r"time_emb_proj: two factors.*gfprune carry"):
        refuse_misfits(network, {f"{name}.{part}.weight": value for part, value in parts.items()}, None)
