"""Several sparsities of one flow, and as much as a limit of the loss allows."""

import contextlib
import itertools
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clocks import Machine
from conftest import QUICK, Gfprune
from test_prune import files

import gfprune_cli
from gfprune_cli.errors import Interrupted, UsageError
from gfprune_cli.progress import Event
from gfprune_cli.pruning import loss_limit
from gfprune_cli.pruning.loss_limit import Trial, crossing, ratio_of
from gfprune_cli.pruning.result import PruneResult, PruneResults

TARGETS = (0.2, 0.35, 0.5)
BRIEF: dict[str, Any] = {**QUICK, "iterations": 1}


def record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "gfprune.json").read_text())
    return found


def stops_every(count: int) -> Callable[[], Callable[[Event], None]]:
    """Callbacks that stop each run after so many events, a few more each time so that every run gets on."""
    runs = itertools.count()

    def stopper() -> Callable[[Event], None]:
        left = itertools.count(count * (1 + next(runs)), -1)

        def stop(event: Event) -> None:
            if next(left) == 0:
                raise Interrupted("stop", signal.SIGTERM)

        return stop

    return stopper


def stopped_and_resumed(model: Path, settings: dict[str, Any], count: int) -> int:
    """A run that is stopped again and again until it ends; how often it was."""
    stopper = stops_every(count)
    for run in itertools.count():
        with contextlib.suppress(Interrupted):
            gfprune_cli.prune(str(model), resume=run > 0, progress=stopper(), **settings)
            return run
    raise AssertionError("counting ends nowhere")


@pytest.fixture(scope="module")
def several(pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PruneResults]:
    """The tiny pipeline at three sparsities."""
    out = tmp_path_factory.mktemp("several") / "out"
    result = gfprune_cli.prune(str(pipeline_folder), sparsity=TARGETS, out=out, **BRIEF)
    assert isinstance(result, PruneResults)
    return out.parent, result


def test_each_sparsity_gets_a_network_inside_the_one_before(several: tuple[Path, PruneResults]) -> None:
    """Nested: what has gone stays out. Every budget is met by itself, and every output loads."""
    folder, result = several
    outer: dict[str, set[int]] | None = None
    assert [Path(network.output or "").name for network in result.networks] == [
        f"out-{target:g}" for target in TARGETS
    ]
    for target, network in zip(TARGETS, result.networks, strict=True):
        assert 0 <= network.sparsity["achieved"] - target <= 0.01
        kept = {name: set(units) for name, units in record(folder / f"out-{target:g}")["kept"].items()}
        assert outer is None or all(units <= outer[name] for name, units in kept.items())
        outer = kept
        model = gfprune_cli.load(folder / f"out-{target:g}")
        assert sum(parameter.numel() for parameter in model.parameters()) == network.params["after"]
        assert network.loss["removed"] == pytest.approx(network.loss["masked"], rel=1e-4)
    spent = [network.scoring_gradients for network in result.networks]
    assert spent == sorted(spent)


def test_what_comes_after_a_sparsity_does_not_change_its_network(
    several: tuple[Path, PruneResults], pipeline_folder: Path, tmp_path: Path
) -> None:
    """The recipe in the record, which ends with its own sparsity, gives the same bytes."""
    folder, _ = several
    recipe = record(folder / "out-0.35")["recipe"]
    assert recipe["sparsity"] == [0.2, 0.35]
    written = tmp_path / "recipe.yaml"
    written.write_text("\n".join(f"{key}: {json.dumps(value)}" for key, value in recipe.items()))
    gfprune_cli.prune(config=written, out=tmp_path / "out")
    for target in (0.2, 0.35):
        assert files(tmp_path / f"out-{target:g}") == files(folder / f"out-{target:g}")


@pytest.mark.thorough  # a limited one is stopped, too
def test_a_run_for_several_stopped_again_and_again_writes_the_same_bytes(
    several: tuple[Path, PruneResults], pipeline_folder: Path, tmp_path: Path
) -> None:
    folder, _ = several
    settings = {"sparsity": TARGETS, "out": tmp_path / "out", **BRIEF}
    assert stopped_and_resumed(pipeline_folder, settings, 50) > 2
    for target in TARGETS:
        assert files(tmp_path / f"out-{target:g}") == files(folder / f"out-{target:g}")
    assert not list(tmp_path.glob(".*"))


def test_the_command_prints_one_document_and_each_path(
    pipeline_folder: Path, tmp_path: Path, gfprune: Gfprune
) -> None:
    command = ["prune", "--model", pipeline_folder, "--sparsity", "0.2", "--sparsity", "0.3", "--dry-run"]
    planned = json.loads(gfprune(*command, "--json").stdout)
    assert [network["sparsity"]["target"] for network in planned["networks"]] == [0.2, 0.3]
    assert planned["networks"][0]["params"]["after"] > planned["networks"][1]["params"]["after"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (dict(sparsity=[0.3, 0.5], layout="native"), "native makes one network"),
        (dict(sparsity=[0, 0.5]), "sparsity 0 removes nothing"),
        (dict(sparsity=[0.3, 0.5], keep_loss=1.1), "makes one network"),
        (dict(sparsity=0, keep_loss=1.1), "removes nothing that"),
        (dict(layout="native", keep_loss=1.1), "more widths"),
        (dict(keep_loss=1.0), "greater than 1"),
    ],
)
def test_what_does_not_go_together_is_refused(
    settings: dict[str, Any], said: str, pipeline_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=said):
        gfprune_cli.prune(str(pipeline_folder), out=tmp_path / "out", **{**QUICK, **settings})
    assert not list(tmp_path.iterdir())


LIMITED: dict[str, Any] = {**BRIEF, "keep_loss": 1.2, "recover": 0}


@pytest.fixture(scope="module")
def limited(pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PruneResult]:
    out = tmp_path_factory.mktemp("limited") / "out"
    result = gfprune_cli.prune(str(pipeline_folder), out=out, **LIMITED)
    assert isinstance(result, PruneResult)
    return out, result


def test_a_limit_of_the_loss_decides_the_sparsity(limited: tuple[Path, PruneResult]) -> None:
    """The network written is the last one that kept the limit; its loss, taken after removal, agrees."""
    out, result = limited
    limit = record(out)["limit"]
    assert limit == result.limit
    assert limit["stopped_by"] == "loss"
    kept = [trial for trial in limit["trials"] if trial["keeps"]]
    broke = [trial for trial in limit["trials"] if not trial["keeps"]]
    assert all(trial["ratio"] <= 1.2 for trial in kept)
    assert all(trial["ratio"] > 1.2 for trial in broke)
    assert 0 <= result.sparsity["achieved"] - kept[-1]["sparsity"] <= 0.01
    assert min(trial["sparsity"] for trial in broke[-2:]) - kept[-1]["sparsity"] <= 0.01 + 1e-9
    assert result.loss["removed"] / result.loss["before"] == pytest.approx(limit["loss"], rel=1e-3)
    assert limit["spread"] > 0


def test_a_limited_run_stopped_again_and_again_writes_the_same_bytes(
    limited: tuple[Path, PruneResult], pipeline_folder: Path, tmp_path: Path
) -> None:
    out, _ = limited
    assert stopped_and_resumed(pipeline_folder, {"out": tmp_path / "out", **LIMITED}, 90) > 1
    assert files(tmp_path / "out") == files(out)


def test_a_sparsity_beside_a_limit_is_the_most_that_goes(pipeline_folder: Path, tmp_path: Path) -> None:
    settings = {**LIMITED, "keep_loss": 100, "sparsity": 0.2}
    result = gfprune_cli.prune(str(pipeline_folder), out=tmp_path / "out", **settings)
    assert isinstance(result, PruneResult)
    assert result.limit is not None
    assert result.limit["stopped_by"] == "budget"
    assert len(result.limit["trials"]) == 1
    assert 0 <= result.sparsity["achieved"] - 0.2 <= 0.01


@pytest.mark.parametrize(("limit", "stopped_by"), [(100, "budget"), (1.0005, "loss")])
def test_a_speed_beside_a_limit_is_the_most_that_goes(
    pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: float, stopped_by: str
) -> None:
    """Only a network that goes all the way is as fast as was asked, and timed."""
    monkeypatch.setenv("GFPRUNE_CACHE", str(tmp_path / "cache"))
    Machine().install(monkeypatch)
    settings = {**LIMITED, "keep_loss": limit, "speedup": 1.5}
    result = gfprune_cli.prune(str(pipeline_folder), out=tmp_path / "out", **settings)
    assert isinstance(result, PruneResult)
    assert result.limit is not None
    assert result.time is not None
    assert (result.limit["of"], result.limit["stopped_by"]) == ("time", stopped_by)
    if stopped_by == "budget":
        assert result.time["measured"]["speedup"] == pytest.approx(1.5, rel=0.03)
    else:
        assert result.time["measured"] is None
        assert 1 < result.time["predicted"]["speedup"] < 1.5
        assert result.limit["loss"] <= limit


def test_a_limit_that_no_network_keeps_is_said_and_nothing_is_written(
    pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_limit, "ratio_of", lambda *losses: (1.3 * ratio_of(*losses)[0], 0.01))
    settings = {**LIMITED, "refit": False}
    with pytest.raises(UsageError, match=r"cannot be kept: with .*% of both gone the loss is 1\."):
        gfprune_cli.prune(str(pipeline_folder), out=tmp_path / "out", **settings)
    assert not list(tmp_path.glob("out"))


def test_the_spread_of_a_ratio_is_what_repeated_draws_show() -> None:
    """Against 4,000 samples of pairs of losses that go up and down together."""
    source = np.random.default_rng(0)

    def pair() -> tuple[torch.Tensor, torch.Tensor]:
        dense = source.gamma(0.5, 1.0, 64)
        return torch.tensor(1.1 * dense + source.normal(0, 0.05, 64)), torch.tensor(dense)

    found = [ratio_of(*pair()) for _ in range(4000)]
    ratios, spreads = np.array(found).T
    assert ratios.mean() == pytest.approx(1.1, abs=5e-3)
    assert spreads.mean() == pytest.approx(ratios.std(), rel=0.1)


@pytest.mark.parametrize("power", [1.5, 2.0, 4.0])
def test_a_guess_is_exact_where_the_rise_is_a_power_of_the_sparsity(power: float) -> None:
    def trial(sparsity: float) -> Trial:
        return Trial(sparsity, 1 + sparsity**power, 0.0, keeps=False)

    wanted = 1 + 0.4**power
    assert crossing(trial(0.2), trial(0.7), wanted) == pytest.approx(0.4)
    if power == 2:
        assert crossing(None, trial(0.7), wanted) == pytest.approx(0.4)
        assert crossing(trial(0.2), None, wanted) == pytest.approx(0.4)
