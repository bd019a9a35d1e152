"""What a run will need is known before it starts."""

import json
import platform
import subprocess
import sys
import weakref
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline, UNet2DConditionModel, UNet2DModel
from networks import PLAIN
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import gfprune_cli
from gfprune_cli.diffusion.variance import VariancePreserving
from gfprune_cli.errors import GfpruneError, Interrupted
from gfprune_cli.flow.energy import gradient
from gfprune_cli.inputs.examples import example_inputs
from gfprune_cli.progress import Event
from gfprune_cli.pruning import job, networks
from gfprune_cli.pruning.fold import CHOOSE, FIT
from gfprune_cli.pruning.memory import FLOAT, GIB, Kept, MemoryPlan, Pass, Phase, measured_pass, one_pass
from gfprune_cli.pruning.phases import (
    CHECKING,
    FOLDING,
    LOSSES,
    RECOVERING,
    REFITTING,
    SCORING,
    alternatives,
    phases_of,
)
from gfprune_cli.recipes.prune import PruneRecipe
from gfprune_cli.runtime import memory
from gfprune_cli.runtime.device import offload, weights_of

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
    one = one_pass(planned, inputs)
    assert 0.7 < kept_by_autograd(cls(**config)) / (one.kept + one.maps) < 1.4


def test_what_is_alive_at_once_is_what_a_pass_allocates() -> None:
    """Three layers in a row: an input, an output, and nothing of what went before."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 32), nn.Linear(32, 8))
    given = torch.empty(1, 8, device="meta")
    one = measured_pass(model, lambda network: network(given))
    assert one.forward == 64 + 32
    assert one.kept == 64 + 32 + 8
    assert one.layers == ((1, 8, 64), (1, 64, 32), (1, 32, 8))


def test_first_derivatives_keep_no_attention_weights() -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 4, 256, 8).unbind(0)
    sizes: list[int] = []

    def loss(weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        def pack(tensor: torch.Tensor) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            mixed = nn.functional.scaled_dot_product_attention(query * weights["scale"], key, value)
        return mixed.square().sum()

    at = {"scale": torch.ones(8)}
    _, found = gradient([loss], at)
    assert max(sizes) < 256 * 256
    with sdpa_kernel(SDPBackend.MATH):
        _, plain = gradient([loss], at)
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)


def plan(free: float, *phases: Phase, **others: list[Phase]) -> MemoryPlan:
    """Gigabytes in the place of bytes."""
    alternatives = {flags.replace("_", "-"): [[phase] for phase in found] for flags, found in others.items()}
    return MemoryPlan(torch.device("cpu"), round(free * GIB), GIB, phases, alternatives)


def test_as_many_samples_at_once_as_fit() -> None:
    scoring = Phase("scoring", 4, GIB // 2, 16)
    for free, samples in ((4.8, 1), (5.4, 2), (6.5, 4), (8.6, 8), (100, 16)):
        found = plan(free, scoring)
        found.check()
        assert found.at_once("scoring") == samples


def test_a_run_that_cannot_fit_is_refused_with_both_numbers_and_advice_that_helps() -> None:
    scoring, refitting = Phase("scoring", 3, GIB, 16), Phase("refitting", 3, GIB // 8, 64, 64)
    others = dict(no_refit=[scoring], recover=[scoring, refitting], no_refit_recover=[scoring])
    with pytest.raises(
        GfpruneError, match=r"about 11\.0 GiB on cpu while refitting, and 8\.0 GiB are free: use no-refit$"
    ):
        plan(8, scoring, refitting, **others).check()
    with pytest.raises(GfpruneError, match=r"2\.0 GiB are free: use a machine with more memory$"):
        plan(2, scoring, refitting, **others).check()


def test_few_draws_need_what_few_draws_take_and_nothing_given_is_advised() -> None:
    recipe = PruneRecipe(draws=4, one_shot=True, refit=False, recover=0)
    one = Pass(kept=100, maps=1000, forward=10)
    phases = {forms[0].name: forms for forms in phases_of(recipe, one, offload=False)}
    assert [(form.wanted, form.sample) for form in phases[SCORING]] == [(4, 4 * 100)]
    assert REFITTING not in phases
    assert list(alternatives(recipe, one)) == []
    flow = PruneRecipe(criterion="gradient-flow")
    phases = {forms[0].name: forms for forms in phases_of(flow, one, offload=False)}
    assert [form.sample for form in phases[SCORING]] == [3 * 4 * 1100, 4 * 100]
    assert list(alternatives(flow, one)) == [
        "--no-refit", "--recover 0", "--no-refit --recover 0", "--criterion taylor",
    ]  # fmt: skip


def test_memory_is_settled_before_anything_is_drawn(
    pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run in less memory than it would like takes pieces, and keeps the same channels."""
    found, pieces = {}, []
    at_once = MemoryPlan.at_once

    def noted(plan: MemoryPlan, name: str) -> int:
        pieces.append((name, at_once(plan, name)))
        return pieces[-1][1]

    monkeypatch.setattr(MemoryPlan, "at_once", noted)
    for name, free in (("plenty", 1 << 34), ("little", 15_000_000), ("none", 1 << 20)):
        monkeypatch.setattr(job, "available", lambda device, free=free: free)
        settings: dict[str, Any] = dict(images=8, sample_steps=2, draws=16, refit=False, recover=2)
        if name == "none":
            monkeypatch.setattr(VariancePreserving, "sample", lambda *_: pytest.fail("images were drawn"))
            with pytest.raises(GfpruneError, match="are free: use a machine with more memory"):
                gfprune_cli.prune(str(pipeline_folder), out=tmp_path / name, **settings)
        else:
            gfprune_cli.prune(str(pipeline_folder), out=tmp_path / name, **settings)
            found[name] = json.loads((tmp_path / name / "gfprune.json").read_text())["kept"]
    assert found["plenty"] == found["little"]
    assert {samples for phase, samples in pieces if phase == SCORING} == {16, 8}


@pytest.mark.slow
def test_a_dense_network_that_memory_has_no_room_for_stays_on_disk(
    pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same network to rounding, from one copy of the weights; a notice says so, and nothing is left."""
    written, said = {}, []
    fits = MemoryPlan.fits
    settings: dict[str, Any] = dict(images=8, sample_steps=2, draws=8, recover=0)
    for name in ("memory", "disk"):
        if name == "disk":  # a plan whose largest phase holds one copy, and what is done with it
            monkeypatch.setattr(
                MemoryPlan, "fits", lambda plan, phases: phases[0].copies < 2 and fits(plan, phases)
            )
        events: list[Event] = []
        gfprune_cli.prune(str(pipeline_folder), out=tmp_path / name, progress=events.append, **settings)
        said.append([event.text for event in events if "stay on disk" in (event.text or "")])
        written[name] = gfprune_cli.load(tmp_path / name).state_dict()
    assert [len(texts) for texts in said] == [0, 1]
    torch.testing.assert_close(written["disk"], written["memory"], rtol=1e-2, atol=2e-4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "memory"]


def test_of_several_forms_of_a_phase_the_first_that_fits_is_taken() -> None:
    """As usual, activations computed again, gradients in turns; and a recovery that keeps less."""
    one = Pass(kept=8 * GIB // 4, recomputed=GIB // 4, forward=GIB // 8)
    forms = phases_of(PruneRecipe(), one, offload=True)
    found = {}
    for free in (14, 5, 3, 2.5):
        chosen = plan(free).of(forms)
        settings = {name: dict(chosen.settings(name)) for name in (SCORING, RECOVERING)}
        trained = settings[RECOVERING]
        found[free] = (settings[SCORING].get("turns", 0), trained.get("optimizer"), trained.get("ema"))
        assert chosen.fits([phase for phase in chosen.phases if phase.name in settings])
    muon, adafactor = "muon", "adafactor"
    assert found == {14: (0, None, None), 5: (1, muon, None), 3: (2, muon, 0.0), 2.5: (4, adafactor, 0.0)}


def test_kept_in_half_all_but_recovery_takes_no_more_than_three_and_a_half_bytes_per_parameter() -> None:
    recipe, one = PruneRecipe(), Pass(kept=8, recomputed=4, forward=2)
    forms = phases_of(recipe, one, offload=True, narrow=0.5, stored=0.5)
    copies = {phases[-1].name: phases[-1].copies for phases in forms}
    assert copies.pop(RECOVERING) == 1
    assert max(copies.values()) * FLOAT <= 3.5
    for phases, others in zip(forms, phases_of(recipe, one, offload=True, narrow=0.5), strict=True):
        assert phases[-1].copies <= others[-1].copies


def test_a_refit_holds_the_weights_before_it_unless_they_lie_on_a_disk() -> None:
    one = Pass(kept=8, recomputed=4, forward=2)
    found = {}
    for offload_teacher in (False, True):
        phases = phases_of(PruneRecipe(), one, offload=offload_teacher)
        found[offload_teacher] = next(forms[-1].copies for forms in phases if forms[-1].name == REFITTING)
    assert found == {False: 3, True: 1}


class Stop:
    """Stops a run after its first iteration."""

    def __call__(self, event: Event) -> None:
        if event.phase == "refitted":
            raise Interrupted("stopped", 2)


@pytest.mark.slow
def test_weights_of_a_checkpoint_in_half_stay_so_where_memory_is_short(
    smallest_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss as low; record and notice say so; a run that stopped goes on so, whatever is free by then."""
    DDPMPipeline.from_pretrained(smallest_folder, torch_dtype=torch.bfloat16).save_pretrained(tmp_path / "in")
    fits, written, records, said = MemoryPlan.fits, {}, {}, []
    settings: dict[str, Any] = dict(images=8, sample_steps=2, draws=4, iterations=2, recover=0)

    def short(plan: MemoryPlan, phases: list[Phase]) -> bool:
        return phases[0].copies < 0.98 and fits(plan, phases)

    for name in ("plenty", "little", "stopped"):
        monkeypatch.setattr(MemoryPlan, "fits", fits if name == "plenty" else short)
        events: list[Event] = []
        out = tmp_path / name
        if name == "stopped":
            with pytest.raises(Interrupted):
                gfprune_cli.prune(str(tmp_path / "in"), out=out, progress=Stop(), **settings)
            monkeypatch.setattr(MemoryPlan, "fits", fits)  # the memory is there again
        resume = name == "stopped"
        gfprune_cli.prune(str(tmp_path / "in"), out=out, progress=events.append, resume=resume, **settings)
        said.append([event.text for event in events if "kept in bfloat16" in (event.text or "")])
        written[name] = gfprune_cli.load(out).state_dict()
        records[name] = json.loads((out / "gfprune.json").read_text())
    assert [len(texts) for texts in said] == [0, 1, 0]
    assert records["little"]["resolved"]["short_of_memory"]["weights"] == {"kept_in": "bfloat16"}
    assert any(refit["layers"] for refit in records["little"]["refit"]["iterations"])
    assert records["little"]["kept"] == records["stopped"]["kept"]
    loss = {name: record["loss"]["removed"] for name, record in records.items()}
    assert loss["little"] == pytest.approx(loss["plenty"], rel=0.02)
    torch.testing.assert_close(written["stopped"], written["little"], rtol=1e-2, atol=1e-4)


def test_the_masked_network_is_gone_when_the_narrow_one_is_measured(
    smallest_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow, take_losses, masked, alive = networks.Networks.narrow, networks.take_losses, [], []

    def narrowed(made: Any, model: Any, *given: Any) -> Any:
        masked.append(weakref.ref(model))
        return narrow(made, model, *given)

    def measured(*given: Any) -> None:
        alive.append(masked[-1]() is not None)
        take_losses(*given)

    monkeypatch.setattr(networks.Networks, "narrow", narrowed)
    monkeypatch.setattr(networks, "take_losses", measured)
    brief: dict[str, Any] = dict(images=8, sample_steps=2, draws=4, iterations=2, recover=0)
    gfprune_cli.prune(str(smallest_folder), out=tmp_path / "out", **brief)
    assert alive == [False]


@pytest.mark.parametrize(("sparsities", "spent"), [((0.3,), [1.0]), ((0.3, 0.5), [0.0, 0.0])])
@pytest.mark.parametrize("refit", [True, False])
def test_the_wide_weights_go_while_the_narrow_ones_are_cut_from_them(
    smallest_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sparsities: tuple[float, ...],
    spent: list[float],
    refit: bool,
) -> None:
    """Else removal takes more than anything before it; but of a network that goes on, or teaches, none go."""
    narrow, remove, gone = networks.Networks.narrow, networks.remove, []
    without = lambda model: sum(one.is_meta for one in model.parameters()) / len(list(model.parameters()))  # noqa: E731

    def narrowed(made: Any, wide: Any, kept: Any, behind: Any) -> Any:
        found = narrow(made, wide, kept, behind)
        gone.append(without(wide))
        assert behind is None or not behind.weights
        assert not without(found)
        return found

    def removed(model: Any, *given: Any, **how: Any) -> Any:
        found = remove(model, *given, **how)
        assert without(model) == float(how["spend"])
        return found

    monkeypatch.setattr(networks.Networks, "narrow", narrowed)
    monkeypatch.setattr(networks, "remove", removed)
    brief: dict[str, Any] = dict(images=8, sample_steps=2, draws=4, iterations=2, recover=0, refit=refit)
    out = tmp_path / "out" if len(sparsities) == 1 else tmp_path / "out-{sparsity}"
    gfprune_cli.prune(str(smallest_folder), out=out, sparsity=sparsities, **brief)
    if not refit and len(sparsities) == 1:
        spent = [0.0]  # masks are put before the dense network itself
    assert gone == spent


def test_losses_of_a_network_are_taken_beside_the_flow_that_goes_on_from_it() -> None:
    one = Pass(kept=100, forward=10)

    def copies(*targets: float) -> float:
        forms = phases_of(PruneRecipe(sparsity=targets), one, offload=True)
        return next(phases[0].copies for phases in forms if phases[0].name == LOSSES)

    assert (copies(0.5), copies(0.3, 0.5)) == (1, pytest.approx(1 + 0.7))


def test_what_is_let_go_stays_with_the_process_where_there_is_room_for_it(
    smallest_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """glibc may hold as much again as the plan says, which would not fit into half as much again."""
    freely: list[int] = []
    plans: list[MemoryPlan] = []
    check = MemoryPlan.check
    monkeypatch.setattr(job, "keep_nothing_back", lambda: freely.append(len(plans)))
    monkeypatch.setattr(MemoryPlan, "check", lambda plan: (plans.append(plan), check(plan)))
    settings: dict[str, Any] = dict(images=4, sample_steps=1, draws=2, iterations=1, recover=0, dry_run=True)
    for room in ("plenty", "short"):
        free = 1 << 36 if room == "plenty" else int(1.5 * plans[0].peak)
        monkeypatch.setattr(job, "available", lambda _device, free=free: free)
        gfprune_cli.prune(str(smallest_folder), out=tmp_path / "out", **settings)
    assert freely == [2], "in the second run alone"


KEPT = """
import sys, torch
from gfprune_cli.runtime.memory import give_back, keep_nothing_back

def held():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) / 1024

if "freely" in sys.argv:
    keep_nothing_back()
torch.ones(30 << 18)  # 30 MiB that went: from here on glibc takes smaller ones from what it keeps
before = held()
large = int(sys.argv[2])  # KiB
found = [torch.ones(size << 8) for _ in range((120 << 10) // large) for size in (large, 64)]
small = found[1::2]
del found
if "trimmed" in sys.argv:
    give_back()
print(held() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="what is set is glibc's")
def test_what_is_let_go_goes_back_to_the_system() -> None:
    """120 MiB in tensors of 6 MiB, or of 1 MiB, smaller ones between them."""
    mib = {}
    for case in (("freely", "6144"), ("as usual", "6144"), ("trimmed", "1024"), ("as usual", "1024")):
        done = subprocess.run([sys.executable, "-c", KEPT, *case], capture_output=True, text=True, check=True)
        mib[case] = float(done.stdout)
    for (name, _), kept in mib.items():
        if name == "as usual":
            assert kept > 60, "else this tests nothing"
        else:
            assert kept < 20


def test_folding_alone_checks_removal_in_what_memory_there_is() -> None:
    one = Pass(kept=100, forward=10)
    for free, doubles in ((8, True), (3, False)):
        chosen = plan(free).of(
            phases_of(PruneRecipe(sparsity=0.0, fold=0.01), one, offload=False, folds=True)
        )
        assert chosen.settings(CHECKING) == {"doubles": doubles}


def test_folding_counts_the_factors_and_what_they_are_fitted_to() -> None:
    one = Pass(forward=10, layers=((1, 100, 600), (64, 1000, 1000)))
    forms = phases_of(PruneRecipe(), one, offload=True, stored=0.5, folds=True)
    (folding,) = next(phases for phases in forms if phases[0].name == FOLDING)
    rows = FIT + CHOOSE
    made = 2 * FLOAT * 1000 * 1000  # a layer that is kept in half, in float32
    held = FLOAT * (rows * 100 + 100 * 600 // 2)
    assert (folding.copies, folding.sample) == (0.5, FLOAT * 10)
    assert held + made < folding.need(0, 0) < held + made + 10 * FLOAT * rows * 600
    assert FOLDING not in {phases[0].name for phases in phases_of(PruneRecipe(), one, offload=True)}


def test_without_folding_is_advised_where_that_is_what_does_not_fit() -> None:
    one = Pass(kept=8, recomputed=4, forward=2, layers=((1, 100, 60_000), (64, 1000, 10)))
    assert "--fold 0" in alternatives(PruneRecipe(), one, folds=True)
    assert "--fold 0" not in alternatives(PruneRecipe(), one)
    forms = alternatives(PruneRecipe(), one, folds=True)["--fold 0"]
    assert FOLDING not in {phases[0].name for phases in forms}


def test_what_gave_is_what_the_record_says() -> None:
    one = Pass(kept=8 * GIB // 4, recomputed=GIB // 4, forward=GIB // 8)
    assert plan(100).of(phases_of(PruneRecipe(), one, offload=False)).gave() == {}
    gave = plan(2.5).of(phases_of(PruneRecipe(), one, offload=True)).gave()
    assert gave[SCORING] == {"recomputes": True, "turns": 4}
    assert gave[RECOVERING]["optimizer"] == "adafactor"
    half = replace(plan(100).of(phases_of(PruneRecipe(), one, offload=False)), half="bfloat16")
    assert half.gave() == {"weights": {"kept_in": "bfloat16"}}


def test_blocks_may_be_called_with_keywords() -> None:
    kept = Kept()
    assert kept(lambda x, *, scale: x * scale, torch.ones(3), scale=torch.ones(3)).sum() == 3
    assert kept.inputs == 6


def test_the_weights_of_a_network_that_is_elsewhere(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 1))).requires_grad_(False)
    expected = {name: weight.clone() for name, weight in network.named_parameters()}
    torch.testing.assert_close(weights_of(network), expected)
    offload(network, torch.device("cpu"), tmp_path)
    assert all(weight.is_meta for weight in network.parameters())
    torch.testing.assert_close(weights_of(network), expected)


def test_a_network_without_blocks_to_recompute_has_no_other_forms() -> None:
    forms = phases_of(PruneRecipe(), Pass(kept=100, forward=10), offload=True)
    assert {forms[0].name: len(forms) for forms in forms}[SCORING] == 1


@pytest.mark.parametrize(("cls", "config"), [(UNet2DModel, PLAIN), (UNet2DConditionModel, TEXT)])
def test_recomputing_keeps_less_and_the_plan_is_near(cls: type, config: dict) -> None:
    """What autograd holds at the end of a forward pass through blocks that are computed again."""
    with torch.device("meta"):
        one = one_pass(cls(**config), example_inputs(cls(**config)))
    model = cls(**config)
    model.enable_gradient_checkpointing()
    held = kept_by_autograd(model)
    assert one.recomputed is not None
    assert held < one.recomputed < 0.8 * one.kept


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
