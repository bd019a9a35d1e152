"""What `eval` says a network costs: fair timing, exact counts, and no crash where a row cannot be had."""

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import NETWORKS, build, inputs, random_scores, structure

from gfprune_cli.errors import Interrupted
from gfprune_cli.evaluation import cost
from gfprune_cli.evaluation.cost import (
    FEWEST,
    WARM_UP,
    Latency,
    Stopwatch,
    macs,
    measure_latency,
    peak_memory,
)
from gfprune_cli.evaluation.deepcache import INTERVAL, DeepCache
from gfprune_cli.evaluation.footprint import cycle_macs, rise_on_cpu
from gfprune_cli.progress import Event, silent
from gfprune_cli.structure.budget import allocate
from gfprune_cli.structure.groups import select
from gfprune_cli.structure.removal import remove

CPU = torch.device("cpu")
CACHEABLE = [name for name in NETWORKS if name != "ncsnpp"]
OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


class Time:
    """A clock that only moves when told to."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds

    def work(self, seconds: float) -> Callable[[], None]:
        def call() -> None:
            self.seconds += seconds

        return call


def pruned(name: str, seed: int = 0) -> Any:
    """Half of the parameters of one of `NETWORKS` removed at random scores."""
    groups, _, costs = structure(name)
    scores = random_scores(groups, seed)
    widths = allocate(costs, scores, 0.5, budget="params", strict=False).kept
    kept = {group.name: select(group, scores[group.name], widths[group.name]) for group in groups}
    return remove(build(name), groups, kept)


def measure(model: Any, reference: Any, **changes: Any) -> list[Latency]:
    """Rows on a clock that ticks once per look: every call takes one second."""
    settings: dict[str, Any] = dict(
        batches=[1], modes=["eager"], device=CPU, precision="fp32", mac_ratio=None, repeats=5, report=silent
    )
    ticks = itertools.count()
    return measure_latency(model, reference, clock=lambda: float(next(ticks)), **settings | changes)


def notices(events: list[Event]) -> list[str]:
    return [event.text for event in events if event.phase == "notice"]


def fits(model: Any, images: int) -> Any:
    """The network, with memory for so many images only."""
    inner = model.forward

    def forward(sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if len(sample) > images:
            raise OUT_OF_MEMORY
        return inner(sample, *args, **kwargs)

    model.forward = forward
    return model


# --- timing ----------------------------------------------------------------------------------------


@given(repeats=st.integers(1, 40), count=st.integers(1, 3))
def test_calls_take_turns_in_alternating_order_after_warming_up(repeats: int, count: int) -> None:
    log: list[int] = []
    calls = [partial(log.append, index) for index in range(count)]
    times = Stopwatch(CPU, repeats, math.inf, Time(), lambda: None).measure(calls)
    warm = count * WARM_UP
    assert log[:warm] == [index for index in range(count) for _ in range(WARM_UP)]
    forth = list(range(count))
    rounds = [log[start : start + count] for start in range(warm, len(log), count)]
    assert rounds == [forth if number % 2 == 0 else forth[::-1] for number in range(repeats)]
    assert [len(series) for series in times] == [repeats] * count


@given(first=st.floats(0.01, 5), second=st.floats(0.01, 5))
def test_times_are_those_of_the_calls(first: float, second: float) -> None:
    time = Time()
    found = Stopwatch(CPU, 7, math.inf, time, lambda: None).measure([time.work(first), time.work(second)])
    for series, seconds in zip(found, (first, second), strict=True):
        assert series == pytest.approx([seconds] * 7)


@given(call=st.floats(0.001, 100), repeats=st.integers(1, 300))
def test_repeats_end_with_the_time_but_not_too_early(call: float, repeats: int) -> None:
    time = Time()
    (series,) = Stopwatch(CPU, repeats, 2.0, time, lambda: None).measure([time.work(call)])
    assert min(FEWEST, repeats) <= len(series) <= repeats
    if len(series) > FEWEST:  # the last round began before the time was over
        assert sum(series[:-1]) < 2.0 + 1e-6
    if len(series) < repeats:
        assert sum(series) > 2.0 - 1e-6


def test_rows_compare_medians() -> None:
    milliseconds, spread = cost.summary([0.004, 0.001, 0.002, 0.003, 0.1])
    assert milliseconds == pytest.approx(3)
    assert spread == pytest.approx((2, 4))
    assert cost.summary([0.5]) == (500, (500, 500))
    rows = measure(build("ddpm"), build("ddpm"), batches=[1, 3, 1], mac_ratio=2.0)
    assert [(row.mode, row.batch) for row in rows] == [("eager", 1), ("eager", 3)]
    for row in rows:
        assert (row.ms, row.ms_reference, row.speedup, row.mac_ratio) == (1000, 1000, 1, 2.0)
        assert row.spread == row.spread_reference == (1000, 1000)


def test_without_a_reference() -> None:
    (row,) = measure(build("ddpm"), None)
    assert row == Latency("eager", 1, 1000, None, (1000, 1000), None, None, None)


def test_half_precision_computes_in_it() -> None:
    model = build("ddpm")
    seen = set()
    model.conv_out.register_forward_hook(lambda _module, _args, output: seen.add(output.dtype))
    measure(model, None, precision="bf16")
    assert seen == {torch.bfloat16}


def test_network_and_settings_are_left_as_they_were() -> None:
    model = pruned("seams").train()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        seen = set()
        model.conv_out.register_forward_hook(
            lambda module, *_: seen.add((torch.are_deterministic_algorithms_enabled(), module.training))
        )
        measure(model, None)
        assert seen == {(False, False)}
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.requires_grad_(True)(**inputs(model)).sample.sum().backward()  # nothing of inference mode is left


# --- what cannot be measured -----------------------------------------------------------------------


def test_a_compiler_that_fails_costs_only_its_own_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_nothing(model: Any, **_: Any) -> Any:
        raise RuntimeError("no C++ compiler\nand a long story")

    monkeypatch.setattr(torch, "compile", compile_nothing)
    events: list[Event] = []
    rows = measure(build("ddpm"), None, modes=["compile", "eager"], report=events.append)
    assert [row.mode for row in rows] == ["eager"]
    assert notices(events) == ["latency (compile, batch 1) is left out: no C++ compiler"]


@pytest.mark.slow
def test_pruned_networks_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced for real, uneven norms included; only the code generator is left out."""
    compiled = torch.compile

    def trace(model: Any, **options: Any) -> Any:
        return compiled(model, backend="eager", fullgraph=True, **options)

    monkeypatch.setattr(torch, "compile", trace)
    model = pruned("seams")
    assert any(type(module).__name__ == "UnevenGroupNorm" for module in model.modules())
    events: list[Event] = []
    (row,) = measure(model, None, modes=["compile"], batches=[2], report=events.append)
    assert notices(events) == []
    assert (row.mode, row.batch) == ("compile", 2)


def test_out_of_memory_halves_the_batch_of_both() -> None:
    events: list[Event] = []
    rows = measure(fits(build("ddpm"), 100), fits(build("ddpm"), 5), batches=[1, 16], report=events.append)
    assert [row.batch for row in rows] == [1, 4]
    assert notices(events) == ["latency (eager): batch 16 does not fit in memory, 4 is measured"]


def test_a_batch_that_was_measured_already_is_no_second_row() -> None:
    rows = measure(fits(build("ddpm"), 4), None, batches=[4, 8])
    assert [row.batch for row in rows] == [4]


def test_no_memory_at_all_is_a_notice() -> None:
    events: list[Event] = []
    assert measure(fits(build("ddpm"), 0), None, batches=[4], report=events.append) == []
    (text,) = notices(events)
    assert text.startswith("latency (eager, batch 1) is left out: CUDA out of memory")


def test_a_signal_ends_the_measurement() -> None:
    seen: list[Event] = []

    def report(event: Event) -> None:
        seen.append(event)
        if len(seen) == 3:
            raise Interrupted("stopped by SIGTERM", 15)

    with pytest.raises(Interrupted):
        measure(build("ddpm"), None, report=report)
    assert len(seen) == 3


# --- DeepCache -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CACHEABLE)
@pytest.mark.parametrize("make", [build, pruned])
def test_a_shallow_step_equals_a_full_one_on_the_same_inputs(name: str, make: Callable[[str], Any]) -> None:
    model = make(name)
    made = inputs(model)
    cache = DeepCache(model)
    with torch.no_grad():
        expected = model(**made).sample
        assert torch.equal(cache.full_step(**made), expected)
        assert torch.equal(cache.shallow_step(**made), expected)
        assert torch.equal(cache(**made), expected)


def test_shallow_steps_run_the_outer_blocks_only() -> None:
    model = build("seams")
    made = inputs(model)
    counts: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(
                lambda *_, name=name: counts.update({name: counts.get(name, 0) + 1}) or None
            )
    with torch.no_grad():
        DeepCache(model)(**made)
    outer = ("conv_in", "conv_out", "down_blocks.0.resnets", "up_blocks.2")
    for name, count in counts.items():
        assert count == (INTERVAL if name.startswith(outer) else 1), name
    assert len({*counts.values()}) == 2


def test_deep_features_come_from_the_full_step() -> None:
    model = build("ddpm")
    first, second = inputs(model, seed=1), inputs(model, seed=2)
    cache = DeepCache(model)
    with torch.no_grad():
        cache.full_step(**first)
        stale = cache.shallow_step(**second)
        fresh = cache.full_step(**second)
    assert not torch.equal(stale, fresh)


def test_cached_row_is_one_step_of_a_cycle_against_a_plain_step() -> None:
    model, reference = pruned("ddpm"), build("ddpm")
    (row,) = measure(model, reference, modes=["deepcache"], mac_ratio=macs(reference) / macs(model))
    assert row.mode == "deepcache"
    assert (row.ms, row.ms_reference, row.speedup) == (1000 / INTERVAL, 1000, INTERVAL)
    assert row.mac_ratio == pytest.approx(macs(reference) / (cycle_macs(DeepCache(model)) / INTERVAL))
    assert row.mac_ratio > macs(reference) / macs(model)


def test_networks_that_cannot_be_cached_are_left_out() -> None:
    events: list[Event] = []
    assert measure(build("ncsnpp"), None, modes=["deepcache"], report=events.append) == []
    (text,) = notices(events)
    assert text == (
        "latency (deepcache, batch 1) is left out: "
        "SkipDownBlock2D and SkipUpBlock2D pass images beside the features"
    )


# --- MACs and memory -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_macs_are_those_of_the_cost_model(name: str) -> None:
    groups, _, costs = structure(name)
    scores = random_scores(groups, 3)
    widths = allocate(costs, scores, 0.5, budget="params", strict=False).kept
    kept = {group.name: select(group, scores[group.name], widths[group.name]) for group in groups}
    channels = {group.name: int(kept[group.name].sum()) * group.unit_size for group in groups}
    assert macs(build(name)) == costs.macs({})
    assert macs(remove(build(name), groups, kept)) == costs.macs(channels)


def test_allocations_are_added_up() -> None:
    size = 2**20

    def call() -> None:
        first, second = (torch.empty(size, dtype=torch.uint8) for _ in range(2))
        del first
        third = torch.empty(size, dtype=torch.uint8)
        del second, third

    assert rise_on_cpu(call) == 2 * size


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_peak_memory_is_the_weights_and_what_the_batch_needs(precision: Any) -> None:
    model = build("ddpm")
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    peak = {
        batch: peak_memory(model, batch=batch, device=CPU, precision=precision, report=silent)
        for batch in (8, 16, 32)
    }
    assert None not in peak.values()
    # two feature maps of the widest layer must be there at once
    assert peak[8] > weights + 2 * 8 * 16 * 8 * 8 * (4 if precision == "fp32" else 2)
    assert peak[32] - peak[16] == pytest.approx(2 * (peak[16] - peak[8]), rel=0.1)
    assert peak[8] == peak_memory(model, batch=8, device=CPU, precision=precision, report=silent)


def test_pruning_lowers_peak_memory() -> None:
    before, after = (
        peak_memory(model, batch=4, device=CPU, precision="fp32", report=silent)
        for model in (build("seams"), pruned("seams"))
    )
    assert after < before


def test_memory_that_cannot_be_had_is_not_measured() -> None:
    events: list[Event] = []
    found = peak_memory(fits(build("ddpm"), 2), batch=4, device=CPU, precision="fp32", report=events.append)
    assert found is None
    assert notices(events) == ["peak memory is not measured: a batch of 4 does not fit"]
