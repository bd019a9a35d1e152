"""Time as a cost: tables are exact on their points, and sums of layers are what a search counts with."""

import random
import shutil
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from clocks import Machine
from diffusers import UNet2DModel
from networks import NETWORKS

from gfprune_cli.errors import GfpruneError, UsageError
from gfprune_cli.families.family import Sizes
from gfprune_cli.progress import silent
from gfprune_cli.structure.blocks import block_groups
from gfprune_cli.structure.budget import OutOfTime, allocate
from gfprune_cli.structure.cost import TIME, CostModel
from gfprune_cli.structure.graph import discover
from gfprune_cli.structure.ledger import Ledger
from gfprune_cli.structure.times import Grid, LayerTimes
from gfprune_cli.timing import runtimes
from gfprune_cli.timing.kinds import Kind, layers_run
from gfprune_cli.timing.measure import fitted, measured_table, time_table
from gfprune_cli.timing.runtimes import RUNTIMES, Bench

EAGER = Bench("eager", torch.device("cpu"), "fp32", 1, Sizes())


def timed(machine: Machine, patch: pytest.MonkeyPatch, name: str = "ddpm") -> CostModel:
    """Channels and blocks of a small network, and its times."""
    machine.install(patch)
    network = UNet2DModel(**NETWORKS[name])
    channels, trace = discover(network)
    cost = CostModel(network, channels + block_groups(network), trace)
    table = measured_table(network, cost, EAGER, silent)
    table.attach(cost, layers_run(network, EAGER.inputs(network)))
    return cost


def uniform(cost: CostModel) -> dict[str, torch.Tensor]:
    return {name: torch.ones(group.units) for name, group in cost.groups.items()}


def test_a_table_is_exact_on_its_points_and_bilinear_between_them() -> None:
    one = Grid(np.array([8.0, 16, 32]), np.array([4.0, 8]), np.array([[1.0, 2], [3, 5], [4, 9]]))
    other = Grid(np.array([1.0, 2]), np.array([1.0, 2]), np.array([[1.0, 1], [2, 2]]))
    times = LayerTimes([one, other, None], [1, 2, 0], np.array([0, 0, 0.5]), np.array([0, 0, 0.25]))

    def at(layer: int, out: int, into: int) -> float:
        return float(times.of(np.array([layer]), np.array([out]), np.array([into]))[0])

    for i, out in enumerate((8, 16, 32)):
        for j, into in enumerate((4, 8)):
            assert at(0, out, into) == one.ms[i, j]
    assert at(0, 12, 6) == np.mean([1, 2, 3, 5])
    assert at(0, 64, 4) == 4 + 2 * 1  # beyond the last point as between the last two
    assert at(1, 2, 1) == 2 * 2  # it runs twice
    assert at(2, 6, 1) == 0.25 + 3


def test_a_narrower_layer_is_never_slower() -> None:
    """What was measured slower than a wider layer was disturbed: padded, it is that layer."""
    ragged = Grid(np.arange(1.0, 4), np.arange(1.0, 3), np.array([[5.0, 2], [1, 3], [4, 2.5]]))
    assert ragged.smoothed().ms.tolist() == [[1, 2], [1, 2.5], [2.5, 2.5]]


@pytest.mark.parametrize("name", ["ddpm", "seams"])
def test_savings_of_time_are_what_the_cost_model_counts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cost, choice = timed(Machine(), monkeypatch, name), random.Random(name)
    ledger = Ledger(cost, ("params", TIME), {})
    for _ in range(25):
        kept = ledger.kept()
        assert ledger.totals[1] == pytest.approx(cost.total(kept, TIME))
        steps = np.array([cost.groups[one].step for one in ledger.names])
        savings = ledger.savings(steps)
        free = [
            number
            for number, one in enumerate(ledger.names)
            if kept[one] > steps[number]
            and not any(not kept[block] and one in inner for block, inner in ledger.contents.items())
        ]
        number = choice.choice(free)
        after = {**kept, ledger.names[number]: kept[ledger.names[number]] - int(steps[number])}
        saved = cost.total(kept, TIME) - cost.total(after, TIME)
        assert savings[1, number] == pytest.approx(saved, abs=1e-9)
        assert saved >= 0
        ledger.move(ledger.names[number], int(steps[number]), savings[:, number])


def test_a_network_whose_layers_add_up_is_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launching, work per number and tables are told apart by the narrow networks."""
    machine = Machine()
    cost = timed(machine, monkeypatch)
    found = allocate(cost, uniform(cost), 0, time=0.4)
    assert 0.4 <= found.sparsities[TIME] < 0.41
    assert cost.before(TIME) == pytest.approx(1e3 * dense_seconds(machine), rel=0.01)


def dense_seconds(machine: Machine) -> float:
    return machine.network_seconds(EAGER, UNet2DModel(**NETWORKS["ddpm"]))


def test_widths_between_blocks_cost_what_the_next_block_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that work on sixteen channels at once: the table knows, and the search leaves whole blocks."""
    Machine(block=16, launch=1e-7).install(monkeypatch)
    wide = NETWORKS["ddpm"] | {"block_out_channels": (64, 96), "norm_num_groups": 2}
    network = UNet2DModel(**wide)
    groups, trace = discover(network)
    cost = CostModel(network, groups, trace)
    table = measured_table(network, cost, EAGER, silent)
    found = [points for label, points in table.kinds.items() if label.startswith("conv 3x3 of")]
    assert found
    for points in found:
        assert min(*points.out_padding, *points.into_padding) > 0.95
    table.attach(cost, layers_run(network, EAGER.inputs(network)))
    kept = allocate(cost, uniform(cost), 0, time=0.4).kept
    narrowed = [width for name, width in kept.items() if width < cost.groups[name].channels >= 64]
    assert narrowed
    assert sum(width % 16 == 0 for width in narrowed) > 0.8 * len(narrowed)


@pytest.mark.parametrize(
    ("runtime", "device", "mode", "replayed"),
    [
        ("eager", "cpu", None, False),
        ("eager", "cuda", None, False),
        ("compile", "cpu", None, False),
        ("compile", "cuda", "reduce-overhead", True),
    ],
)
def test_a_compiled_network_is_replayed_as_a_whole_on_cuda_and_its_layers_are_timed_so(
    runtime: str, device: str, mode: str | None, replayed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}
    bench = Bench(runtime, torch.device(device), "fp32", 1, Sizes())
    monkeypatch.setattr(runtimes, "layer_seconds", lambda call, device, **how: seen.update(how) or 1.0)
    monkeypatch.setattr(runtimes, "placed", lambda bench, network: network.eval())
    monkeypatch.setattr(torch, "compile", lambda network, **how: seen.update(how) or network)
    monkeypatch.setitem(RUNTIMES, runtime, replace(RUNTIMES[runtime], layer=lambda *_: lambda: None))
    bench.layer_seconds(Kind("linear", (4,)), 8, 8)
    bench.network(UNet2DModel(**NETWORKS["ddpm"]))
    assert seen["replayed"] is replayed
    assert seen.get("mode") == mode


@pytest.mark.parametrize(("runtime", "copies"), [("eager", 3), ("onnx", 4.3)])
def test_networks_that_there_is_no_room_to_time_are_refused_before_anything_is_built(
    runtime: str, copies: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = UNet2DModel(**NETWORKS["ddpm"])
    bench = Bench(runtime, torch.device("cpu"), "fp32", 1, Sizes())
    need = copies * 4 * sum(parameter.numel() for parameter in network.parameters())
    monkeypatch.setattr(runtimes, "available", lambda device: need + 1)
    RUNTIMES[runtime].require_room(bench, network)
    monkeypatch.setattr(runtimes, "available", lambda device: need - 1)
    with pytest.raises(GfpruneError, match="are free: measure the times on a larger machine"):
        time_table(network, CostModel(network, *discover(network)), bench, silent)


def test_graphs_need_room_for_files_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    bench, full = replace(EAGER, runtime="onnx"), SimpleNamespace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    with pytest.raises(GfpruneError, match="space"):
        RUNTIMES["onnx"].require_room(bench, UNet2DModel(**NETWORKS["ddpm"]))


def test_what_lies_between_layers_is_never_negative() -> None:
    layers, numbers, whole = np.array([4.0, 2, 1]), np.array([8.0, 4, 2]), np.array([10.0, 6, 4])
    scale, per_number, per_layer = fitted(layers, numbers, 10, whole)
    assert min(scale, per_number, per_layer) >= 0
    assert scale * layers + per_number * numbers + 10 * per_layer == pytest.approx(whole, rel=0.01)
    falling = fitted(layers, numbers, 10, np.array([4.0, 5, 6]))
    assert min(falling) >= 0


def test_two_budgets_hold_together(monkeypatch: pytest.MonkeyPatch) -> None:
    cost = timed(Machine(), monkeypatch)
    for sparsity, time in ((0.3, 0.45), (0.6, 0.2)):
        found = allocate(cost, uniform(cost), sparsity, budget="both", time=time)
        assert min(found.sparsities["params"], found.sparsities["macs"]) >= sparsity
        assert found.sparsities[TIME] >= time
        left = [found.sparsities["params"] - sparsity, found.sparsities["macs"] - sparsity]
        assert min(*left, found.sparsities[TIME] - time) < 0.02


def test_what_cannot_be_that_fast_says_how_fast_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    cost = timed(Machine(launch=1e-3), monkeypatch)
    with pytest.raises(OutOfTime) as raised:
        allocate(cost, uniform(cost), 0, time=0.9)
    assert 1 - raised.value.nearest.sparsities[TIME] > 0.1


def test_a_table_of_another_network_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    Machine().install(monkeypatch)
    network = UNet2DModel(**NETWORKS["ddpm"])
    groups, trace = discover(network)
    cost = CostModel(network, groups, trace)
    table = measured_table(network, cost, EAGER, silent)
    larger = Bench("eager", torch.device("cpu"), "fp32", 2, Sizes())
    with pytest.raises(UsageError, match="no times of 'conv 3x3 of 2x8x8'"):
        table.attach(cost, layers_run(network, larger.inputs(network)))
