"""Recovery's parts: losses, their features and weights, timesteps, the training step, the logs."""

import copy
import itertools
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import TINY
from diffusers import DDPMScheduler, DiTTransformer2DModel, ScoreSdeVeScheduler, UNet2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gfprune_cli.checkpoint.reader import cast_model
from gfprune_cli.checkpoint.record import Origin, Record
from gfprune_cli.data.sample_rows import grid
from gfprune_cli.diffusion.draws import Batch, Draws
from gfprune_cli.diffusion.schedulers import VariancePreserving, noising_process
from gfprune_cli.errors import GfpruneError, Interrupted, UsageError
from gfprune_cli.outputs.state import StateFolder
from gfprune_cli.progress import Event, silent
from gfprune_cli.recipes.finetune import FinetuneRecipe
from gfprune_cli.recovery.job import FinetuneJob
from gfprune_cli.recovery.logs import METRICS, Watch
from gfprune_cli.recovery.lora import add_adapters, merge_adapters
from gfprune_cli.recovery.losses import FeaturePair, RecoveryLoss
from gfprune_cli.recovery.optimizers import eight_bit_optimizers, hidden_matrices, make_optimizer
from gfprune_cli.recovery.recover import channels_last, recover
from gfprune_cli.recovery.teacher import paired_layers
from gfprune_cli.recovery.trainer import Remedies, Stopped, Trainer, learning_rate
from gfprune_cli.runtime.processes import Processes
from gfprune_cli.structure.blocks import block_groups
from gfprune_cli.structure.graph import discover
from gfprune_cli.structure.removal import remove

CPU = torch.device("cpu")
PROCESS = noising_process(DDPMScheduler())


class Scale(nn.Module):
    """The network x -> factor * x."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor, return_dict: bool = True) -> Any:
        return (self.factor * x,)


def tiny(seed: int = 0, **changes: Any) -> UNet2DModel:
    torch.manual_seed(seed)
    return UNet2DModel(**TINY | changes).eval()


def batch(count: int = 4, seed: int = 0) -> Batch:
    images = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)
    return Draws(images, 1000, seed).batch("test", 0, count)


def half_pruned(dense: UNet2DModel) -> tuple[nn.Module, Record]:
    """A network that keeps the upper half of every group's cells, and its record."""
    groups, _ = discover(dense)
    kept = {}
    for group in groups:
        units = torch.zeros(group.units, dtype=torch.bool)
        units[group.cells[:, group.cells.shape[1] // 2 :].flatten()] = True
        kept[group.name] = units
    channels = {group.name: group.kept_channels(kept[group.name]).tolist() for group in groups}
    return remove(dense, groups, kept), Record({}, Origin("dense", "local", None, {}), channels, "unet")


@pytest.mark.parametrize("heads", [8, None])
def test_kept_positions_lead_from_the_students_weights_to_the_teachers(heads: int | None) -> None:
    dense = tiny(attention_head_dim=heads)
    nn.init.normal_(dense.mid_block.attentions[0].to_q.bias)
    student, record = half_pruned(dense)
    layers = paired_layers(dense, record)
    positions, scales = layers.positions, layers.scales
    assert len(positions) > 10
    assert bool(scales) == (heads is None), "one head becomes narrower, several become fewer"
    for name, index in positions.items():
        mine, theirs = student.get_submodule(name), dense.get_submodule(name)
        torch.testing.assert_close(mine.bias, theirs.bias[index] * scales.get(name, 1.0), msg=name)


def test_layers_behind_a_block_that_went_are_compared_under_their_old_names() -> None:
    torch.manual_seed(0)
    shape = dict(num_attention_heads=2, attention_head_dim=8, in_channels=4, sample_size=8, norm_num_groups=4)
    dense: Any = DiTTransformer2DModel(num_layers=3, num_embeds_ada_norm=10, **shape)
    groups = discover(dense)[0] + block_groups(dense)
    kept = {group.name: torch.ones(group.units, dtype=torch.bool) for group in groups}
    kept["transformer_blocks.1"][0] = False
    for group in groups:
        if not group.stack:
            kept[group.name][0] = False
    channels = {group.name: group.kept_channels(kept[group.name]).tolist() for group in groups}
    record = Record({"recipe": {"blocks": True}}, Origin("dense", "local", None, {}), channels, "transformer")
    student, layers = remove(dense, groups, kept), paired_layers(dense, record)
    assert layers.names["transformer_blocks.1.attn1.to_q"] == "transformer_blocks.2.attn1.to_q"
    for name, index in layers.positions.items():
        mine, theirs = student.get_submodule(name), dense.get_submodule(layers.names[name])
        torch.testing.assert_close(mine.bias, theirs.bias[index], msg=name)


def test_a_record_of_another_network_is_refused() -> None:
    dense = tiny()
    _, record = half_pruned(dense)
    name = next(iter(record.kept))
    with pytest.raises(GfpruneError, match="another model"):
        paired_layers(dense, Record({}, record.source, record.kept | {name: [0, 99999]}, "unet"))
    missing = {key: value for key, value in record.kept.items() if key != name}
    with pytest.raises(GfpruneError, match="another model"):
        paired_layers(dense, Record({}, record.source, missing, "unet"))


def loss_of(student: nn.Module, teacher: nn.Module, pair: FeaturePair | None = None, **weights: Any) -> Any:
    defaults = dict(denoise=0.0, distill=0.0, features=0.0, jacobian=0.0, image_weight=0.0)
    recipe = FinetuneRecipe(model="m", **defaults | weights)
    return RecoveryLoss(student, teacher, PROCESS, recipe, pair, "fp32")


def test_features_compare_each_kept_channel_with_the_teachers() -> None:
    """Layers that read the image agree on their kept channels; deeper ones miss what was removed."""
    dense = tiny()
    student, record = half_pruned(dense)
    found = paired_layers(dense, record)
    pair = FeaturePair(student, dense, replace(found, scales={}))
    layers = [name for name in pair.positions if student.get_submodule(name).weight.ndim == 4]
    assert "down_blocks.0.resnets.0.conv1" in layers
    loss = loss_of(student, dense, pair, features=1.0)
    assert float(loss.terms(batch(), None, 0.0)["features"][1].mean()) > 0.01
    # conv_in reads the image in both, so its kept channels are the same
    only = FeaturePair(
        student, dense, replace(found, positions={"conv_in": found.positions["conv_in"]}, scales={})
    )
    loss = loss_of(student, dense, only, features=1.0)
    assert float(loss.terms(batch(), None, 0.0)["features"][1].abs().max()) < 1e-10


def test_the_feature_term_decays_to_nothing_and_gives_gradients() -> None:
    dense = tiny()
    student, record = half_pruned(dense)
    student.requires_grad_(True)
    loss = loss_of(student, dense, FeaturePair(student, dense, paired_layers(dense, record)), features=0.5)
    assert [loss.terms(batch(), None, share)["features"][0] for share in (0.0, 0.5)] == [0.5, 0.25]
    assert "features" not in loss.terms(batch(), None, 1.0)
    loss.terms(batch(), None, 0.0)["features"][1].sum().backward()
    assert float(student.get_submodule("conv_in").weight.grad.abs().max()) > 0
    assert not loss.features.caught["student"], "activations are let go"


def test_a_long_run_leans_less_on_the_data_unless_told_or_alone() -> None:
    """The share that leads past the teacher is one of samples, whatever the batch."""
    recipe = FinetuneRecipe(model="m", steps=400, batch=8)
    assert recipe.denoise_weight == replace(recipe, steps=20).denoise_weight == 0.1
    assert replace(recipe, steps=2000).denoise_weight == replace(recipe, steps=4000, batch=4).denoise_weight
    assert replace(recipe, steps=2000).denoise_weight == pytest.approx(0.02)
    assert replace(recipe, steps=2000, denoise=0.1).denoise_weight == 0.1
    assert replace(recipe, steps=2000, distill=0.0).denoise_weight == 0.1


def test_distillation_is_the_distance_to_the_teacher() -> None:
    sample = batch()
    noisy = PROCESS.add_noise(sample.images, sample.noise, sample.index)
    terms = loss_of(Scale(3.0), Scale(1.0), distill=1.0).terms(sample, None, 0.0)
    expected = (2 * noisy).square().flatten(1).mean(1)
    torch.testing.assert_close(terms["distill"][1], expected)


def test_jacobian_matching_compares_how_far_inputs_are_stretched() -> None:
    sample = batch()
    probe = torch.randn_like(sample.images)
    terms = loss_of(Scale(3.0), Scale(2.0), jacobian=1.0).terms(sample, probe, 0.0)
    # |J v|^2 is 9 and 4 times |v|^2: ((9 - 4) / 4)^2, whatever the direction
    torch.testing.assert_close(terms["jacobian"][1], torch.full((4,), (5 / 4) ** 2), rtol=1e-3, atol=0)
    same = loss_of(Scale(2.0), Scale(2.0), jacobian=1.0).terms(sample, probe, 0.0)
    assert float(same["jacobian"][1].detach().abs().max()) == 0


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_min_snr_weighs_every_prediction_as_the_same_error_of_the_image(prediction: str) -> None:
    """Weight times loss is min(snr, gamma) times the squared error of the predicted image."""
    signal = torch.tensor([0.999, 0.9, 0.5, 0.1, 0.01])
    process = VariancePreserving(signal, prediction)
    index = torch.arange(5)
    generator = torch.Generator().manual_seed(0)
    images, noise, error = (torch.randn(5, 3, 4, 4, generator=generator) for _ in range(3))
    x = process.add_noise(images, noise, index)
    output = process.target(images, noise, index) + error
    shape = signal.view(-1, 1, 1, 1)
    wrong, _ = process.split(output, x, shape)
    snr = signal / (1 - signal)
    expected = snr.clamp_max(5) * (wrong - images).square().flatten(1).mean(1)
    weighted = process.min_snr(index, 5.0) * process.losses(output, images, noise, index)
    torch.testing.assert_close(weighted, expected, rtol=1e-3, atol=1e-4)


def test_min_snr_at_zero_signal_and_for_exploding_variance_is_finite() -> None:
    for prediction in ("epsilon", "v_prediction", "sample"):
        process = VariancePreserving(torch.tensor([0.5, 0.0]), prediction)
        assert bool(process.min_snr(torch.tensor([0, 1]), 5.0).isfinite().all())
    exploding = noising_process(ScoreSdeVeScheduler())
    weights = exploding.min_snr(torch.tensor([0, 1999]), 5.0)
    assert float(weights[0]) == pytest.approx(5 * 0.01**2)
    assert float(weights[1]) == 1.0


@settings(max_examples=30)
@given(st.integers(1, 17), st.integers(1, 50), st.integers(0, 5), st.data())
def test_draws_do_not_depend_on_how_a_batch_is_split(of: int, steps: int, seed: int, data: Any) -> None:
    draws = Draws(torch.randn(3, 1, 2, 2), steps, seed)
    cut = data.draw(st.integers(0, of))
    for levels in ("stratified", "antithetic", "uniform"):
        whole = draws.batch("train", 3, of, levels=levels)
        parts = [
            draws.batch("train", 3, count, first=first, of=of, levels=levels)
            for first, count in ((0, cut), (cut, of - cut))
            if count
        ]
        assert torch.equal(whole.index, torch.cat([part.index for part in parts]))
        assert torch.equal(whole.noise, torch.cat([part.noise for part in parts]))
        assert 0 <= int(whole.index.min()) <= int(whole.index.max()) < steps
        if levels == "antithetic":
            pairs = whole.index[: of // 2 * 2].view(-1, 2)
            assert bool((pairs.sum(1) == steps - 1).all())


def test_stratified_levels_take_one_from_every_part_of_the_schedule() -> None:
    draws = Draws(torch.randn(3, 1, 2, 2), 1000, 0)
    index = draws.batch("train", 0, 10, levels="stratified").index
    assert (index // 100).tolist() == list(range(10))
    uniform = torch.cat([draws.batch("train", step, 10, levels="uniform").index for step in range(50)])
    assert 400 < float(uniform.float().mean()) < 600
    assert any(
        len(set((draws.batch("train", step, 10, levels="uniform").index // 100).tolist())) < 10
        for step in range(3)
    )


def test_the_learning_rate_warms_up_and_ends_at_a_tenth() -> None:
    rates = [learning_rate(step, 100, 1.0, 10) for step in range(100)]
    assert rates[:10] == pytest.approx([share / 10 for share in range(1, 11)])
    assert all(a >= b for a, b in itertools.pairwise(rates[9:]))
    assert learning_rate(100, 100, 1.0, 10) == pytest.approx(0.1)
    assert learning_rate(0, 1, 1.0, 0) == 1.0


def make_trainer(**recipe: Any) -> Trainer:
    """The x -> a x network, taught by x -> x."""
    network = Scale(2.0)
    defaults = dict(steps=10, batch=4, denoise=0.0, distill=1.0)
    chosen = FinetuneRecipe(model="m", **defaults | recipe)
    images = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    plain = replace(chosen, features=0.0, min_snr=None, image_weight=0.0)
    made = RecoveryLoss(network, Scale(1.0), PROCESS, plain, None, chosen.precision or "fp32")
    return Trainer(network, made, Draws(images, 1000, 0), chosen, Processes(None, CPU))


def never() -> bool:
    return False


def train(trainer: Trainer, steps: int) -> float:
    for step in range(steps):
        trainer.step(step, never)
    return float(trainer.network.factor.detach())


@pytest.mark.parametrize("timesteps", ["stratified", "adaptive"])
def test_losses_that_differ_by_level_keep_their_mean_over_the_schedule(timesteps: str) -> None:
    """Adaptive draws look at noise, where this loss is 20 times as large; what is minimised is the same."""
    trainer = make_trainer(timesteps=timesteps, learning_rate=1e-9, steps=150, batch=8)
    trainer.loss.recipe = replace(trainer.loss.recipe, image_weight=20.0)
    found = [trainer.step(step, never)["distill"] for step in range(150)]
    index = torch.arange(1000)
    factor = trainer.network.factor.detach() - 1
    expected = float((factor.square() * PROCESS.image_weight(index, 20.0)).mean())
    assert sum(found) / len(found) == pytest.approx(expected, rel=0.06)
    drawn = torch.cat([trainer.batch(step, 0, 8).index for step in range(150, 170)])
    late = float((drawn >= 500).float().mean())
    assert late == 0.5 if timesteps == "stratified" else late > 0.7


def test_features_count_less_and_less_and_no_more_after_their_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, asked = make_trainer(steps=8), []
    terms = trainer.loss.terms

    def record(sample: Batch, probe: Any, progress: float) -> Any:
        asked.append(progress)
        return terms(sample, probe, progress)

    monkeypatch.setattr(trainer.loss, "terms", record)
    monkeypatch.setattr("gfprune_cli.recipes.finetune.SHORT_RUN", 4 * trainer.recipe.batch)
    train(trainer, 8)
    assert asked == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("asked", [None, 0.1])
def test_layers_that_cannot_be_paired_stop_only_who_asks_for_features(
    asked: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> Any:
        raise GfpruneError("the record is of another model")

    told: list[Event] = []
    monkeypatch.setattr("gfprune_cli.recovery.job.pipeline_inputs", refuse)
    job: Any = SimpleNamespace(
        recipe=FinetuneRecipe(model="m", features=asked),
        teacher=SimpleNamespace(component=None),
        progress=told.append,
    )
    if asked:
        with pytest.raises(GfpruneError, match="another model"):
            FinetuneJob.features(job, Scale(1.0), Scale(1.0))
    else:
        assert FinetuneJob.features(job, Scale(1.0), Scale(1.0)) is None
        assert "features are not compared: the record is of another model" in str(told[0])


def test_training_approaches_the_teacher() -> None:
    first = make_trainer(learning_rate=0.1).step(0, never)
    assert first["distill"] > 0.5
    assert abs(train(make_trainer(learning_rate=0.1, steps=40), 40) - 1.0) < 0.2


def test_accumulated_micro_batches_make_the_same_step() -> None:
    whole, parts = make_trainer(), make_trainer(micro_batch=3)
    a, b = whole.step(0, never), parts.step(0, never)
    assert a == pytest.approx(b, rel=1e-5)
    assert whole.network.factor.item() == pytest.approx(parts.network.factor.item(), rel=1e-6)


def test_lack_of_memory_halves_the_micro_batch_and_repeats_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = train(make_trainer(), 3)
    starved = make_trainer()
    backward = Trainer.backward

    def cramped(self: Trainer, step: int, first: int, count: int) -> Any:
        if count > 1:
            raise torch.OutOfMemoryError("no")
        return backward(self, step, first, count)

    monkeypatch.setattr(Trainer, "backward", cramped)
    assert train(starved, 3) == pytest.approx(usual, rel=1e-5)
    assert starved.micro_batch == 1


def test_no_memory_for_one_sample_is_an_error_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(self: Trainer, step: int, first: int, count: int) -> Any:
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(Trainer, "backward", none)
    with pytest.raises(GfpruneError, match="one sample per pass at training step 0: use --checkpointing"):
        make_trainer().step(0, never)


@pytest.mark.parametrize(
    ("culprit", "said"),
    [
        ("gradient", r"step 0 is not finite .*factor.*--learning-rate"),
        (
            "teacher",
            r"the dense model's output is not finite at any of \d+ noise levels: check",
        ),
    ],
)
def test_a_loss_that_is_not_finite_stops_before_the_update(culprit: str, said: str) -> None:
    trainer = make_trainer()
    if culprit == "gradient":
        trainer.network.factor.register_hook(lambda gradient: gradient * math.inf)
    else:
        trainer.loss.teacher.factor.data.fill_(math.nan)
    with pytest.raises(GfpruneError, match=said):
        trainer.step(0, never)
    assert float(trainer.network.factor) == 2.0
    assert float(trainer.ema.shadow_params[0]) == 2.0


def test_an_overflow_in_float16_lowers_the_scale_and_changes_no_weight() -> None:
    trainer = make_trainer(precision="fp16")
    before = trainer.scaler.get_scale()
    trainer.network.factor.register_hook(lambda gradient: gradient * math.inf)
    trainer.step(0, never)
    assert float(trainer.network.factor) == 2.0
    assert trainer.scaler.get_scale() < before
    with pytest.raises(GfpruneError, match="not finite"):  # it may not go on like that for ever
        train(trainer, 60)


def test_stopping_within_a_step_applies_nothing_of_it() -> None:
    trainer = make_trainer(micro_batch=1)
    answers = iter([False, False, True])
    with pytest.raises(Stopped):
        trainer.step(0, lambda: next(answers))
    assert float(trainer.network.factor) == 2.0
    assert trainer.network.factor.grad is None
    assert train(trainer, 2) == train(make_trainer(micro_batch=1), 2)


def test_the_average_follows_its_warm_up() -> None:
    trainer, expected = make_trainer(learning_rate=0.1), None
    for step in range(4):
        trainer.step(step, never)
        weight = float(trainer.network.factor)
        decay = min(0.9999, (1 + step) / (10 + step)) if step else 0.0
        expected = weight if expected is None else decay * expected + (1 - decay) * weight
    assert float(trainer.ema.shadow_params[0]) == pytest.approx(expected, rel=1e-5)
    with trainer.averaged() as network:
        assert float(network.factor) == pytest.approx(expected, rel=1e-5)
    assert float(trainer.network.factor) == pytest.approx(weight)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_restored_trainer_goes_on_as_if_it_had_not_stopped(precision: str) -> None:
    whole = make_trainer(precision=precision)
    train(whole, 6)
    first, second = make_trainer(precision=precision), make_trainer(precision=precision)
    train(first, 3)
    tensors, numbers = first.state()
    second.restore(copy.deepcopy(tensors), json.loads(json.dumps(numbers)))
    for step in range(3, 6):
        second.step(step, never)
    assert float(second.network.factor) == float(whole.network.factor)
    assert torch.equal(second.ema.shadow_params[0], whole.ema.shadow_params[0])


class Layers(nn.Module):
    """A network with every kind of layer that optimisers tell apart."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv_in = nn.Conv2d(3, 8, 3)
        self.blocks = nn.ModuleList(
            [nn.Conv2d(8, 12, 3), nn.Linear(5, 7), nn.Conv2d(12, 6, 1), nn.Conv2d(6, 6, 3, groups=6)]
        )
        self.embeddings = nn.ModuleList([nn.Embedding(4, 8), nn.GroupNorm(2, 8)])


def one_update(optimizer: torch.optim.Optimizer, named: dict[str, nn.Parameter], seed: int) -> None:
    """One step along gradients that depend on names and seed; convolutions may be given flattened."""
    for number, parameter in enumerate(named.values()):
        source = torch.Generator().manual_seed(100 * seed + number)
        parameter.grad = torch.empty_like(parameter)
        parameter.grad.copy_(torch.randn(parameter.numel(), generator=source).view(parameter.shape))
    optimizer.step()


@pytest.mark.parametrize("last", [False, True])
def test_muon_moves_matrices_as_torchs_own_does_and_adamw_the_rest(last: bool) -> None:
    hidden = ("blocks.0.weight", "blocks.1.weight", "blocks.2.weight")
    network = Layers()
    flat = {
        name: nn.Parameter(parameter.detach().clone().flatten(1) if name in hidden else parameter.clone())
        for name, parameter in network.named_parameters()
    }
    start = {name: parameter.detach().clone() for name, parameter in flat.items()}
    if last:
        channels_last(network)
        assert not network.blocks[0].weight.is_contiguous()
    settings = dict(lr=0.01, weight_decay=0.1)
    muon = torch.optim.Muon([flat[name] for name in hidden], adjust_lr_fn="match_rms_adamw", **settings)
    adamw = torch.optim.AdamW([flat[name] for name in flat if name not in hidden], fused=True, **settings)
    made = make_optimizer("muon", network, **settings)
    assert list(hidden_matrices(network)) == list(hidden)
    for step in range(3):
        one_update(made, dict(network.named_parameters()), step)
        one_update(muon, flat, step)
        adamw.step()
    for name, parameter in network.named_parameters():
        found, expected = parameter.detach().reshape(flat[name].shape), flat[name].detach()
        if (
            name in hidden and channels_last
        ):  # columns in another order: rounded in another order, in bfloat16
            moved = expected - start[name]
            assert float((found - expected).norm()) < 0.02 * float(moved.norm()), name
        else:
            assert torch.equal(found, expected), name


def test_networks_with_convolutions_over_time_are_stored_channels_last_too() -> None:
    network = channels_last(nn.Sequential(nn.Conv3d(3, 4, (1, 2, 2)), nn.Conv2d(4, 8, 3), nn.Linear(8, 2)))
    contiguous = [parameter.is_contiguous() for parameter in network.parameters() if parameter.ndim > 1]
    assert contiguous == [True, False, True]


def test_muon_takes_the_hidden_layers_of_every_family() -> None:
    found = hidden_matrices(tiny())
    assert "down_blocks.0.resnets.0.conv1.weight" in found
    assert "mid_block.attentions.0.to_q.weight" in found
    assert not [name for name in found if name.startswith(("conv_in", "conv_out", "time_embedding"))]
    assert all(weight.ndim in (2, 4) for weight in found.values())
    shape = dict(num_attention_heads=2, attention_head_dim=8, in_channels=4, sample_size=8, norm_num_groups=4)
    dit: Any = DiTTransformer2DModel(num_layers=1, num_embeds_ada_norm=10, **shape)
    names = hidden_matrices(dit)
    assert "transformer_blocks.0.attn1.to_q.weight" in names
    assert not [name for name in names if name.startswith(("pos_embed", "proj_out"))]
    assert not [name for name in names if "embedding_table" in name]


def unet_trainer(
    optimizer: str, *, last: bool = False, precision: str = "fp32", lora: int | None = None, **changes: Any
) -> Trainer:
    """A tiny U-Net, taught by another one."""
    student, teacher = tiny(1), tiny(0)
    if last:
        channels_last(student)
    if lora:
        add_adapters(student, ["conv_in", "mid_block.resnets.0.conv1"], lora, 0)
    settings = dict(steps=4, batch=2, optimizer=optimizer, precision=precision, lora=lora)
    recipe = FinetuneRecipe(model="m", **settings | changes)  # type: ignore[arg-type]
    loss = RecoveryLoss(student, teacher.requires_grad_(False), PROCESS, recipe, None, precision)  # type: ignore[arg-type]
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    return Trainer(student, loss, Draws(images, 1000, 0), recipe, Processes(None, CPU))


@pytest.mark.parametrize(
    ("optimizer", "settings"),
    [
        *(
            (name, dict(last=last))
            for name in ("adamw", "soap", "muon", "adafactor")
            for last in (False, True)
        ),
        *((name, dict(lora=2)) for name in ("adamw", "soap", "muon")),
        ("muon", dict(ema=0.0)),
        ("adamw8bit", dict()),
    ],
)
def test_a_saved_trainer_resumes_to_the_same_bytes(
    optimizer: str, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if optimizer == "adamw8bit":
        monkeypatch.setitem(sys.modules, "bitsandbytes.optim", SimpleNamespace(AdamW8bit=Bytes))
    whole, first, second = (unet_trainer(optimizer, **settings) for _ in range(3))
    for step in range(4):
        whole.step(step, never)
    for step in range(2):
        first.step(step, never)
    folder = StateFolder(tmp_path / "out", {})
    folder.save(*first.state())
    saved = folder.load()
    assert saved is not None
    assert any(name.startswith("momentum_buffer/") for name in saved[0]) == (optimizer == "muon")
    second.restore(*saved)
    for step in range(2, 4):
        second.step(step, never)
    expected, found = whole.state(), second.state()
    assert expected[1] == found[1]
    assert expected[0].keys() == found[0].keys()
    assert all(torch.equal(found[0][name], tensor) for name, tensor in expected[0].items())


def test_an_overflow_in_float16_skips_both_parts_of_muon() -> None:
    trainer = unet_trainer("muon", precision="fp16")
    before = {name: parameter.detach().clone() for name, parameter in trainer.parameters.items()}
    handle = trainer.network.conv_in.bias.register_hook(lambda gradient: gradient * math.inf)
    trainer.step(0, never)
    assert all(torch.equal(trainer.parameters[name], tensor) for name, tensor in before.items())
    handle.remove()
    for step in range(1, 4):
        trainer.step(step, never)
    moved = [not torch.equal(trainer.parameters[name], tensor) for name, tensor in before.items()]
    assert sum(moved) > 0.9 * len(moved)


class Bytes(torch.optim.Optimizer):
    """Keeps its state as bitsandbytes does: bytes in the weight's shape, a scale, a shared table, an int."""

    table = torch.arange(256.0)

    def __init__(self, parameters: Any, *, lr: float, weight_decay: float) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            if not state:
                state |= dict(step=0, state1=torch.zeros_like(parameter, dtype=torch.uint8), qmap1=self.table)
            assert isinstance(state["step"], int)
            assert state["state1"].dtype == torch.uint8
            state["step"] += 1
            state["state1"] += (parameter.grad > 0).byte()
            state["absmax1"] = parameter.grad.abs().max()[None]
            change = (self.table[state["state1"].int()] - state["step"] / 2) * state["absmax1"]
            parameter -= self.param_groups[0]["lr"] * change


def test_a_missing_bitsandbytes_is_one_line_that_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(UsageError, match=r"adamw8bit needs bitsandbytes .*gfprune\[8bit\].*adafactor"):
        eight_bit_optimizers()


@pytest.mark.parametrize("last", [False, True])
def test_adafactor_keeps_sums_over_rows_and_columns_of_the_whole_matrix(last: bool) -> None:
    """It moves flattened weights as torch's own does, with a state that is small beside them."""
    network = Layers()
    flat = {
        name: nn.Parameter(parameter.detach().clone().flatten(1) if parameter.ndim > 2 else parameter.clone())
        for name, parameter in network.named_parameters()
    }
    if last:
        channels_last(network)
    settings = dict(lr=0.01, weight_decay=0.1)
    plain = torch.optim.Adafactor(flat.values(), foreach=False, **settings)
    made = make_optimizer("adafactor", network, **settings)
    for step in range(3):
        one_update(made, dict(network.named_parameters()), step)
        one_update(plain, flat, step)
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(
            parameter.detach().reshape(flat[name].shape), flat[name].detach(), msg=name
        )
    weight = network.get_parameter("blocks.0.weight")
    kept = sum(value.numel() for key, value in made.state[weight].items() if key != "step")
    assert kept == 12 + 8 * 9


def test_only_what_trains_has_gradients_moments_and_an_average() -> None:
    trainer = unet_trainer("muon", lora=2)
    trainer.step(0, never)
    assert len(trainer.parameters) == len(trainer.optimizer.state) == len(trainer.ema.shadow_params) == 4
    assert {name.rpartition("/")[2] for name in trainer.state()[0]} == set(trainer.parameters)
    assert all(".lora_" in name for name in trainer.parameters)


def test_without_an_average_there_is_no_copy_of_the_weights() -> None:
    trainer = make_trainer(ema=0.0, learning_rate=0.1)
    train(trainer, 3)
    assert trainer.ema is None
    assert not any(name.startswith("ema/") for name in trainer.state()[0])
    with trainer.averaged() as network:
        assert network is trainer.network
    state = Kept()
    assert float(recovered(Scale(2.0), state, ema=0.0).factor) == float(state.saved[0]["weight/factor"])


def test_a_teacher_in_bfloat16_is_called_in_its_own_type() -> None:
    dense, student = tiny(0), tiny(1)
    single = loss_of(student, dense, distill=1.0).terms(batch(), None, 0.0)["distill"][1]
    cast_model(dense, torch.bfloat16)
    assert {parameter.dtype for parameter in dense.parameters()} == {torch.bfloat16}
    half = loss_of(student, dense, distill=1.0)
    torch.testing.assert_close(half.terms(batch(), None, 0.0)["distill"][1], single, rtol=0.05, atol=0)
    assert not bool(half.not_finite(batch()).any())


class Kept:
    """A state in memory: another command's may be as plain."""

    def __init__(self) -> None:
        self.saved: Any = None

    def begin(self) -> None:
        pass

    def load(self) -> Any:
        return self.saved

    def save(self, tensors: Any, numbers: Any) -> None:
        self.saved = copy.deepcopy((dict(tensors), dict(numbers)))


def recovered(
    student: nn.Module, state: Kept, *, stop_at: int = 0, remedies: Remedies | None = None, **recipe: Any
) -> nn.Module:
    """A student that `recover` has trained towards x -> x, told to stop after a step."""
    images = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    chosen = FinetuneRecipe(model="m", **dict(steps=40, batch=4, learning_rate=0.1, denoise=0.0) | recipe)

    def progress(event: Event) -> None:
        if event.phase == "finetune" and event.step == stop_at:
            raise Interrupted("stop", 15)

    recover(
        student, Scale(1.0), PROCESS, Draws(images, 1000, 0), chosen, processes=Processes(None, CPU),
        precision="fp32", state=state, progress=progress if stop_at else silent, save_every=7,
        remedies=remedies,
    )  # fmt: skip
    return student


def test_recovery_in_memory_leaves_the_averaged_weights_and_resumes() -> None:
    state = Kept()
    student = recovered(Scale(2.0).requires_grad_(False), state)
    assert abs(float(student.factor) - 1.0) < 0.3
    assert not student.factor.requires_grad
    assert torch.equal(student.factor, state.saved[0]["ema/factor"])
    interrupted = Kept()
    with pytest.raises(Interrupted, match="the state is saved"):
        recovered(Scale(2.0), interrupted, stop_at=10)
    assert interrupted.saved[1]["done"] == 10
    assert torch.equal(recovered(Scale(2.0), interrupted).factor, student.factor)


def test_a_failing_recovery_advises_what_its_command_can_do() -> None:
    with pytest.raises(GfpruneError, match=r"not finite .*: give it up$"):
        recovered(Scale(math.nan), Kept(), remedies=Remedies("give it up", ""))


def test_a_state_of_another_network_is_refused() -> None:
    trainer = make_trainer()
    train(trainer, 1)
    tensors, numbers = trainer.state()
    tensors["ema/factor"] = torch.zeros(3)
    with pytest.raises(GfpruneError, match="does not fit: ema of factor"):
        make_trainer().restore(tensors, numbers)


def test_features_are_those_of_a_layer_with_its_adapter() -> None:
    dense = tiny()
    student, record = half_pruned(dense)
    found = paired_layers(dense, record)
    only = replace(found, positions={"conv_in": found.positions["conv_in"]}, scales={})
    tuner = add_adapters(student, ["conv_in"], 2, 0)
    loss = loss_of(student, dense, FeaturePair(student, dense, only), features=1.0)
    assert float(loss.terms(batch(), None, 0.0)["features"][1].abs().max()) < 1e-10
    student.get_parameter("conv_in.lora_B.default.weight").data.fill_(0.1)
    adapted = loss.terms(batch(), None, 0.0)["features"][1].detach()
    assert float(adapted.min()) > 1e-3
    merged = merge_adapters(tuner)
    again = loss_of(merged, dense, FeaturePair(merged, dense, only), features=1.0)
    torch.testing.assert_close(again.terms(batch(), None, 0.0)["features"][1].detach(), adapted)


@pytest.mark.parametrize("lora", [None, 2])
def test_checkpointing_changes_no_gradient_and_features_survive_it(lora: int | None) -> None:
    dense = tiny()
    results = []
    for recompute in (False, True):
        student, record = half_pruned(dense)
        student.requires_grad_(True)
        if lora:
            add_adapters(student, ["conv_in", "mid_block.resnets.0.conv1"], lora, 0)
        if recompute:
            student.enable_gradient_checkpointing()
        pair = FeaturePair(student, dense, paired_layers(dense, record))
        loss = loss_of(student, dense, pair, features=1.0, distill=1.0)
        terms = loss.terms(batch(), None, 0.0)
        sum(weight * values.sum() for weight, values in terms.values()).backward()
        results.append({name: p.grad for name, p in student.named_parameters() if p.requires_grad})
    for name, gradient in results[0].items():
        torch.testing.assert_close(results[1][name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_metrics_of_steps_that_run_again_are_dropped(tmp_path: Path) -> None:
    watch = Watch(tmp_path, 0)
    for step in (1, 2, 3):
        watch.log(step, {"loss": step / 10})
    watch.close()
    path = tmp_path / METRICS
    path.write_text(path.read_text() + '{"step": 4, "lo')  # killed while writing
    again = Watch(tmp_path, 2)
    again.log(3, {"loss": 9.0})
    again.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 0.1), (2, 0.2), (3, 9.0)]


def test_the_grid_shows_dense_above_pruned_column_by_column() -> None:
    dense, pruned = (
        torch.zeros(3, 3, 8, 8, dtype=torch.uint8),
        torch.full((3, 3, 8, 8), 200, dtype=torch.uint8),
    )
    dense[1] = 100
    page = grid(dense, pruned)
    width = (page.width - 44) // 3
    assert [page.getpixel((44 + width * n + 5, 5))[0] for n in range(3)] == [0, 100, 0]
    assert [page.getpixel((44 + width * n + 5, page.height - 5))[0] for n in range(3)] == [200, 200, 200]


def test_shares_of_a_batch_cover_it_once() -> None:
    for count in (1, 2, 3, 5):
        for total in (1, 4, 7):
            states = [SimpleNamespace(process_index=rank, num_processes=count) for rank in range(count)]
            taken = [draw for state in states for draw in Processes(state, CPU).share(total)]
            assert taken == list(range(total))


def test_the_feature_term_does_not_depend_on_how_a_batch_is_split() -> None:
    dense = tiny()
    student, record = half_pruned(dense)
    loss = loss_of(student, dense, FeaturePair(student, dense, paired_layers(dense, record)), features=1.0)
    sample = batch(4)
    whole = loss.terms(sample, None, 0.0)["features"][1]
    parts = [
        loss.terms(Batch(sample.images[part], sample.noise[part], sample.index[part]), None, 0.0)["features"][
            1
        ]
        for part in (slice(0, 1), slice(1, 4))
    ]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-6)


def test_a_failed_pass_holds_no_activations() -> None:
    dense = tiny()
    student, record = half_pruned(dense)
    pair = FeaturePair(student, dense, paired_layers(dense, record))
    loss = loss_of(student, dense, pair, features=1.0)
    dense.conv_out.register_forward_pre_hook(fail)
    with pytest.raises(torch.OutOfMemoryError):
        loss.terms(batch(), None, 0.0)
    assert not any(pair.caught.values())
    assert not pair.on


def fail(module: nn.Module, inputs: Any) -> None:
    raise torch.OutOfMemoryError("no")
