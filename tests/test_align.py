"""`--align auto`: which widths a device likes, decided once, recorded, and the same in a resumed run."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import QUICK, Gfprune
from hypothesis import given
from hypothesis import strategies as st
from networks import structure

import gfprune_cli
from gfprune_cli.errors import Interrupted, UsageError
from gfprune_cli.progress import Event, PhaseClock, silent
from gfprune_cli.pruning import align as settling
from gfprune_cli.recipes.options import resolve_recipe
from gfprune_cli.recipes.prune import PruneRecipe
from gfprune_cli.structure import latency
from gfprune_cli.structure.latency import (
    ALIGNMENTS,
    Geometry,
    choose_align,
    decide,
    default_align,
    geometries,
    measure_table,
    rounds,
    steps_of,
    widths_of,
)

CPU = torch.device("cpu")
LAYER = Geometry(kernel=3, width=64, side=8, batch=8, share=1.0)
Calls = Sequence[Callable[[], object]]


def padded(width: int, block: int) -> float:
    """Seconds of a kernel that pads its channels to whole blocks."""
    blocks = -(-width // block)
    return 1e-6 * (blocks * block) ** 2


def table_of(
    seconds: Callable[[int], float], layers: Sequence[Geometry] = (LAYER,)
) -> list[dict[int, float]]:
    return [{width: seconds(width) for width in widths_of(layer)} for layer in layers]


def costs() -> Any:
    return structure("ddpm")[2]


# --- the decision --------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [4, 8, 16, 32])
def test_the_alignment_is_the_block_of_the_kernel(block: int) -> None:
    assert decide([LAYER], table_of(lambda width: padded(width, block))) == block


def test_where_time_follows_macs_every_width_is_fine() -> None:
    assert decide([LAYER], table_of(lambda width: 1e-6 * width**2)) == 1


def test_layers_whose_time_does_not_depend_on_width_have_no_say() -> None:
    """A small layer on a large device is all overhead: the device's default stands, or the other layers."""
    assert decide([LAYER], table_of(lambda width: 1e-5)) is None
    other = Geometry(kernel=1, width=64, side=8, batch=8, share=0.1)
    table = [*table_of(lambda width: 1e-5), *table_of(lambda width: padded(width, 8), [other])]
    assert decide([LAYER, other], table) == 8


@given(
    st.sampled_from([4, 8, 16, 32]),
    st.lists(st.floats(0, 0.015), min_size=16, max_size=16),
)
def test_noise_of_a_percent_does_not_change_the_decision(block: int, noise: list[float]) -> None:
    times = {w: padded(w, block) * (1 + noise[i % 16]) for i, w in enumerate(widths_of(LAYER))}
    assert decide([LAYER], [times]) == block


@given(st.integers(1, 4096), st.sampled_from(ALIGNMENTS[1:]))
def test_the_middle_width_lies_between_two_multiples_of_the_coarser_alignment(width: int, align: int) -> None:
    coarser = ALIGNMENTS[ALIGNMENTS.index(align) - 1]
    low, middle, high = steps_of(Geometry(3, width, 8, 8, 1.0), align)
    assert low % coarser == high % coarser == 0
    assert high - low == coarser
    assert middle % coarser == coarser // 2
    assert low > 0


# --- the table -----------------------------------------------------------------------------------


def test_real_layers_are_timed_and_threads_and_random_numbers_stay_as_they_were() -> None:
    """Every geometry of a network, shrunk; on the CPU and in half precision."""
    layers = [Geometry(g.kernel, 16, 4, 2, g.share) for g in geometries(costs(), CPU)]
    assert layers
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    for dtype in (torch.float32, torch.bfloat16):
        table = measure_table(layers, CPU, dtype, latency.timer_of(CPU))
        assert [sorted(times) for times in table] == [widths_of(layer) for layer in layers]
        assert all(seconds > 0 for times in table for seconds in times.values())
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads


def test_calls_take_turns_and_the_first_round_does_not_count() -> None:
    order: list[int] = []
    ticks = iter(range(10**6))
    seconds = rounds([lambda: order.append(0), lambda: order.append(1)], lambda: float(next(ticks)))
    assert order == [0, 1] * (latency.ROUNDS + 1)
    assert seconds == [1.0, 1.0]


def test_geometries_are_those_with_most_macs_and_small_enough_to_time() -> None:
    cost = costs()
    found = geometries(cost, CPU)
    assert 1 <= len(found) <= latency.GEOMETRIES
    assert abs(sum(layer.share for layer in found) - 1) < 1e-4
    assert [layer.share for layer in found] == sorted((layer.share for layer in found), reverse=True)
    for layer in found:
        assert layer.macs(layer.width) <= latency.CALL_MACS["cpu"] or layer.side == 4


class Timer:
    """Pretends to time calls, and counts how often it was asked."""

    def __init__(self, block: int) -> None:
        self.block, self.asked = block, 0

    def __call__(self, calls: Calls) -> list[float]:
        self.asked += 1
        return [padded(width, self.block) for width in self.widths[: len(calls)]]

    def on(self, layers: Sequence[Geometry]) -> "Timer":
        self.widths = widths_of(layers[0])
        return self


@pytest.fixture
def one_layer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A network of one kind of layer, and an empty cache; the folder of tables in it."""
    small = Geometry(kernel=1, width=64, side=4, batch=2, share=1.0)
    monkeypatch.setattr(latency, "geometries", lambda cost, device: [small])
    monkeypatch.setenv("GFPRUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "latency"


def chosen(timer: Timer, report: Any = silent) -> int:
    small = latency.geometries(costs(), CPU)
    return choose_align(costs(), CPU, torch.float32, report, timer.on(small))


def test_a_table_is_measured_once_and_later_runs_decide_by_it(one_layer: Path) -> None:
    first, second = Timer(16), Timer(4)
    assert (chosen(first), chosen(second)) == (16, 16)
    assert (first.asked, second.asked) == (1, 0)


@pytest.mark.parametrize("table", ["absent", "there"])
def test_what_killed_runs_left_among_the_tables_goes(one_layer: Path, table: str) -> None:
    """Also where the table is found, so that nothing is written."""
    if table == "there":
        chosen(Timer(16))
    (one_layer / ".0.json.gfprune-staging-1").mkdir(parents=True)
    assert chosen(Timer(16)) == 16
    (left,) = one_layer.iterdir()
    assert left.suffix == ".json"
    assert not left.name.startswith(".")


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[" * 100000,
        lambda text: "[]",
        lambda text: '{"key": {}, "seconds": [{}]}',
        lambda text: text.replace("rounds", "turns"),
        lambda text: json.dumps(json.loads(text) | {"seconds": [{"16": 1.0}]}),
        lambda text: json.dumps(json.loads(text) | {"seconds": None}),
        lambda text: text.replace(": 0.0", ": 1e9990"),
        lambda text: text.replace(": 0.0", ": -0.0"),
        lambda text: text + " " * latency.TABLE_BYTES,
    ],
)
def test_a_damaged_or_foreign_table_is_measured_again(one_layer: Path, damage: Callable[[str], str]) -> None:
    """Nothing in the cache can do more than cost a second, or choose another of the alignments."""
    assert chosen(Timer(16)) == 16
    (path,) = one_layer.iterdir()
    path.write_text(damage(path.read_text()))
    again = Timer(8)
    assert chosen(again) == 8
    assert again.asked == 1
    assert chosen(Timer(32)) == 8


def test_a_cache_that_cannot_be_written_is_a_notice(one_layer: Path) -> None:
    one_layer.parent.parent.mkdir(exist_ok=True)
    one_layer.parent.write_text("a file where the folder should be")
    events: list[Event] = []
    assert chosen(Timer(8), events.append) == 8
    assert any(event.phase == "notice" and "not cached" in event.text for event in events)


def test_on_cuda_layers_are_larger_and_the_default_is_for_tensor_cores() -> None:
    """The table has the same shape; layers of a size that a GPU takes milliseconds for."""
    cuda = torch.device("cuda")
    on_cpu, on_cuda = geometries(costs(), CPU), geometries(costs(), cuda)
    assert [layer.kernel for layer in on_cuda] == [layer.kernel for layer in on_cpu]
    assert all(b.side >= a.side for a, b in zip(on_cpu, on_cuda, strict=True))
    assert default_align(cuda) == 8
    assert isinstance(latency.timer_of(cuda), latency.partial)


# --- the recipe ----------------------------------------------------------------------------------


def test_the_option_takes_a_number_or_auto(tmp_path: Path) -> None:
    assert resolve_recipe(PruneRecipe, None, {}).align == "auto"
    assert resolve_recipe(PruneRecipe, None, {"align": "16"}).align == 16
    config = tmp_path / "recipe.yaml"
    config.write_text("align: 8\n")
    assert resolve_recipe(PruneRecipe, config, {}).align == 8
    assert resolve_recipe(PruneRecipe, config, {"align": "auto"}).align == "auto"
    for wrong in ("0", "2000", "many"):
        with pytest.raises(UsageError, match="--align"):
            resolve_recipe(PruneRecipe, None, {"align": wrong})


def test_the_command_line_takes_auto_and_says_what_it_stands_for(
    gfprune: Gfprune, pipeline_folder: Path, tmp_path: Path
) -> None:
    flags = (
        "prune",
        "--model",
        pipeline_folder,
        "--one-shot",
        "--images",
        4,
        "--sample-steps",
        2,
        "--draws",
        4,
    )
    done = gfprune(*flags, "--align", "auto", "--out", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out" / "gfprune.json").read_text())
    assert record["recipe"]["align"] in ALIGNMENTS
    assert record["resolved"]["align"] == record["recipe"]["align"]
    assert f"multiples of {record['recipe']['align']}" in done.stderr
    phases = json.loads(done.stdout)["seconds_by_phase"]
    assert {"loading", "calibration", "check", "scoring", "removal", "writing"} <= set(phases)
    wrong = gfprune(*flags, "--align", "wide", "--out", tmp_path / "wrong")
    assert wrong.returncode == 2
    assert "--align" in wrong.stderr


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_recorded_recipe_repeats_the_bytes_whatever_is_measured_later(
    pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = QUICK | dict(one_shot=True)
    monkeypatch.setattr(settling, "choose_align", lambda *a, **k: 8)
    out = tmp_path / "out"
    gfprune_cli.prune(str(pipeline_folder), out=out, **settings)
    first = files_of(out)
    recipe = json.loads(first["gfprune.json"])["recipe"]
    assert recipe["align"] == 8
    monkeypatch.setattr(settling, "choose_align", lambda *a, **k: 1)
    shutil.rmtree(out)
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    gfprune_cli.prune(config=tmp_path / "recipe.json", out=out)
    assert files_of(out) == first
    gfprune_cli.prune(str(pipeline_folder), out=out, force=True, **settings)
    assert files_of(out) != first


def test_a_resumed_run_keeps_the_alignment_of_its_state(
    pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the cache is gone and now something else would be measured; given by hand it must agree."""
    monkeypatch.setattr(settling, "choose_align", lambda *a, **k: 8)
    whole, out = tmp_path / "whole" / "out", tmp_path / "out"
    gfprune_cli.prune(str(pipeline_folder), out=whole, **QUICK)

    def stop(event: Event) -> None:
        if event.phase == "train" and event.step == 4:
            raise Interrupted("stopped", 2)

    with pytest.raises(Interrupted):
        gfprune_cli.prune(str(pipeline_folder), out=out, report=stop, **QUICK)
    monkeypatch.setattr(settling, "choose_align", lambda *a, **k: 1)
    with pytest.raises(UsageError, match="align"):
        gfprune_cli.prune(str(pipeline_folder), out=out, resume=True, align=4, **QUICK)
    gfprune_cli.prune(str(pipeline_folder), out=out, resume=True, **QUICK)
    assert files_of(out) == files_of(whole)
    again = gfprune_cli.prune(str(pipeline_folder), out=out, resume=True, **QUICK)  # it is finished
    assert again.params == json.loads(files_of(out)["gfprune.json"])["params"]
    assert files_of(out) == files_of(whole)
    gfprune_cli.prune(
        str(pipeline_folder), out=out, resume=True, force=True, **QUICK
    )  # perhaps another run's
    assert json.loads(files_of(out)["gfprune.json"])["recipe"]["align"] == 1


def test_nothing_is_measured_for_the_native_layout_or_a_plan(
    pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> int:
        raise AssertionError("measured")

    monkeypatch.setattr(settling, "choose_align", fail)
    gfprune_cli.prune(str(pipeline_folder), dry_run=True)
    native = dict(one_shot=True, layout="native", images=4, sample_steps=2, draws=4)
    result = gfprune_cli.prune(str(pipeline_folder), sparsity=0.4, out=tmp_path / "native", **native)
    assert result.layout == "native"


# --- phases --------------------------------------------------------------------------------------


def test_seconds_go_to_the_phase_in_which_they_passed() -> None:
    """Training reports what is done, the others what begins; a notice changes nothing."""
    now = [0.0]
    seen: list[Event] = []
    clock = PhaseClock(seen.append, lambda: now[0])
    for phase, passed in (
        ("load", 1),
        ("notice", 2),
        ("score", 4),
        ("score", 8),
        ("train", 16),
        ("write", 32),
    ):
        clock(Event(phase))
        now[0] += passed
    assert clock.finish() == {"loading": 3.0, "scoring": 4.0, "training": 24.0, "writing": 32.0}
    assert len(seen) == 6
