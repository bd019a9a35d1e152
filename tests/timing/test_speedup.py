"""`prune --speedup`: the network is as fast as was asked for on a machine whose times are made up."""

import json
import re
from pathlib import Path
from typing import Any

import networks
import pytest
import torch
from clocks import Machine
from conftest import ONE_SHOT, QUICK
from typer.testing import CliRunner, Result

import gfprune_cli
from gfprune_cli.cli.main import app
from gfprune_cli.errors import Interrupted, UsageError
from gfprune_cli.families.family import Sizes
from gfprune_cli.progress import Event
from gfprune_cli.timing import runtimes
from gfprune_cli.timing.closed_loop import close
from gfprune_cli.timing.runtimes import Bench
from gfprune_cli.timing.stopwatch import Reading

LEAST: dict[str, Any] = dict(refit=False, recover=0)  # which times know nothing of
ONCE, TWICE = ONE_SHOT | LEAST, QUICK | LEAST
SURPRISES = {
    "none": lambda seconds: 0.0,
    "fixed": lambda seconds: 4e-4,
    "wide": lambda seconds: 40 * seconds**2,
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Times of one made-up machine are not those of the next."""
    monkeypatch.setenv("GFPRUNE_CACHE", str(tmp_path_factory.mktemp("cache")))


def record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "gfprune.json").read_text())
    return found


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("speedup", "surprise"), [(1.6, "none"), (1.6, "fixed"), (1.25, "wide")])
def test_the_loop_closes_on_what_is_measured(
    pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, surprise: str, speedup: float
) -> None:
    """Whole networks take what no sum of layers tells."""
    Machine(surprise=SURPRISES[surprise]).install(monkeypatch)
    done = gfprune_cli.prune(str(pipeline_folder), out=tmp_path / "out", speedup=speedup, **ONCE)
    assert done.time is not None
    assert done.time["asked"] == {"speedup": speedup}
    assert done.time["measured"]["speedup"] == pytest.approx(speedup, rel=0.03)
    assert done.time["measured"]["steady"]
    assert record(tmp_path / "out")["time"] == done.time
    assert len(done.time["trials"]) <= 4
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"asked for speedup {speedup:g}" in card
    assert f"measured {done.time['measured']['speedup']:.2f} times" in card


def test_the_speed_of_a_network_is_that_of_the_network_written(
    pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine().install(monkeypatch)
    gfprune_cli.prune(str(pipeline_folder), out=tmp_path / "out", speedup=1.5, time_batch=4, **ONCE)
    bench = Bench("eager", torch.device("cpu"), "fp32", 4, Sizes())
    dense, narrow = (
        machine.network_seconds(bench, gfprune_cli.load(folder))
        for folder in (pipeline_folder, tmp_path / "out")
    )
    assert dense / narrow == pytest.approx(record(tmp_path / "out")["time"]["measured"]["speedup"], rel=1e-6)


def test_milliseconds_and_a_sparsity_beside_them(
    pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Machine().install(monkeypatch)
    model = str(pipeline_folder)
    dense = gfprune_cli.analyze(model, speedup=[1.2]).time
    assert dense is not None
    latency = dense["ms"] / 1.4
    done = gfprune_cli.prune(model, out=tmp_path / "out", latency=latency, sparsity=0.5, **ONCE)
    assert done.time is not None
    assert done.time["measured"]["ms"] <= latency * 1.03
    assert done.sparsity["target"] == 0.5
    assert min(done.sparsity["params"], done.sparsity["macs"]) >= 0.5


def test_what_is_out_of_reach_is_said_before_anything_is_scored(
    pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Machine(launch=2e-4).install(monkeypatch)
    done = run("prune", "--model", pipeline_folder, "--speedup", 50, "--out", tmp_path / "out")
    assert done.exit_code == 2
    said = re.search(
        r"error: --speedup 50 cannot be reached: at its narrowest the network is (\S+) times as fast, \S+ "
        r"ms, and (\d+)% of that is launching operators: try --runtime compile, a larger --time-batch or "
        r"--blocks",
        done.stderr,
    )
    assert said, done.stderr
    assert 1 < float(said[1]) < 3
    assert int(said[2]) > 90
    assert "score" not in done.stderr


@pytest.mark.slow
def test_a_file_of_times_makes_runs_repeatable_and_times_nothing(
    pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine, table = Machine().install(monkeypatch), tmp_path / "times.json"
    written = run("analyze", "--model", pipeline_folder, "--times-out", table, "--json")
    assert written.exit_code == 0, written.stderr
    shown = json.loads(written.stdout)["time"]
    assert sum(layer["ms"] for layer in shown["layers"]) == pytest.approx(shown["ms"])
    again = run("analyze", "--model", pipeline_folder, "--times-out", table)
    assert (again.exit_code, "exists: use --force" in again.stderr) == (2, True)
    machine.networks = 0
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    told: list[str] = []
    results = [
        gfprune_cli.prune(
            str(pipeline_folder),
            out=tmp_path / name / "out",
            speedup=1.5,
            times=str(table),
            progress=lambda event: told.append(event.text),
            **ONCE,
        )
        for name in ("one", "two")
    ]
    assert machine.networks == 0
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert results[0].time is not None
    assert results[0].time["measured"] is None
    assert results[0].time["predicted"]["speedup"] == pytest.approx(1.5, rel=0.02)
    assert any("its speed is predicted" in text for text in told)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[]", "is no table of times"),
        ("{", "is no JSON"),
        (None, "No such file"),
        (
            '{"kinds": {"conv": {"out": [2, 1], "into": [1, 2], "ms": [[1, 1], [1, 1]]}}}',
            "is no table of times",
        ),
    ],
)
def test_files_that_are_no_tables_are_refused(
    pipeline_folder: Path, tmp_path: Path, content: str | None, said: str
) -> None:
    if content is not None:
        (tmp_path / "t.json").write_text(content)
    with pytest.raises(UsageError, match=said):
        gfprune_cli.prune(
            str(pipeline_folder), speedup=2, times=str(tmp_path / "t.json"), out=tmp_path / "out"
        )


@pytest.mark.slow
def test_a_run_that_goes_on_measures_nothing_again(
    pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even where the cache is gone and the machine is another."""
    machine = Machine(surprise=SURPRISES["fixed"]).install(monkeypatch)
    settings: dict[str, Any] = dict(model=str(pipeline_folder), speedup=1.5, **TWICE)
    whole = gfprune_cli.prune(out=tmp_path / "whole", **settings)

    def stop(event: Event) -> None:
        if event.phase == "remove":
            raise Interrupted("stopped", 15)

    with pytest.raises(Interrupted):
        gfprune_cli.prune(out=tmp_path / "out", progress=stop, **settings)
    monkeypatch.setenv("GFPRUNE_CACHE", str(tmp_path / "no cache"))
    machine.networks, machine.surprise = 0, SURPRISES["wide"]
    resumed = gfprune_cli.prune(out=tmp_path / "out", resume=True, **settings)
    assert machine.networks == 0
    assert resumed.time is not None
    assert whole.time is not None
    measured = [time["measured"]["speedup"] for time in (resumed.time, whole.time)]
    assert measured[0] == pytest.approx(measured[1])  # as the clock then was, not as it is now
    assert files(tmp_path / "whole").keys() == files(tmp_path / "out").keys()
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert files(tmp_path / "whole")[weights] == files(tmp_path / "out")[weights]


def test_a_busy_machine_is_said(
    pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Turns that differ by half of their time are repeated, and then reported."""
    told: list[str] = []
    Machine(jitter=(0.0, 0.5, 0.1, 0.9, 0.3, 1.4, 0.2)).install(monkeypatch)
    done = gfprune_cli.prune(
        str(pipeline_folder),
        out=tmp_path / "out",
        speedup=1.5,
        progress=lambda event: told.append(event.text),
        **ONCE,
    )
    assert done.time is not None
    assert not done.time["measured"]["steady"]
    assert done.time["measured"]["turns"] > 60
    assert sum("the machine is busy" in text for text in told) >= 1
    assert "on a busy machine" in (tmp_path / "out" / "README.md").read_text()


def test_an_analysis_predicts_the_widths(
    pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Machine().install(monkeypatch)
    found = run(
        "analyze",
        "--model",
        pipeline_folder,
        "--speedup",
        1.3,
        "--speedup",
        1.6,
        "--html",
        tmp_path / "a.html",
    )
    assert found.exit_code == 0, found.stderr
    assert "slowest layers" in found.stdout
    analysis = gfprune_cli.analyze(str(pipeline_folder), speedup=[1.3, 1.6])
    assert [report.speedup for report in analysis.speedups] == [1.3, 1.6]
    for report in analysis.speedups:
        assert report.achieved == pytest.approx(report.speedup, rel=0.02)
    assert analysis.speedups[0].macs > analysis.speedups[1].macs
    page = (tmp_path / "a.html").read_text()
    assert "Where the time goes" in page
    assert "1.6 times" in page


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("prune --speedup 2 --latency 3", "--speedup and --latency say the same in two ways"),
        ("prune --runtime onnx", "--runtime has no effect without --speedup or --latency"),
        ("prune --speedup 2 --times t.json --time-batch 4", "--time-batch has no effect with --times"),
        ("prune --speedup 1", "greater than 1"),
        ("prune --speedup 2 --layout native", "--layout native has too few widths"),
        ("prune --speedup 2 --time-size 4xx", "--time-size 4xx"),
        ("analyze --time-batch 2", "--time-batch has no effect without --speedup or --times-out"),
    ],
)
def test_options_that_do_not_go_together(arguments: str, said: str) -> None:
    done = run(*arguments.split())
    assert done.exit_code == 2
    assert said in done.stderr


def test_the_nearest_of_the_trials_is_taken() -> None:
    """Steps may be too coarse for the target: the loop ends at what it has seen."""

    def propose(left: float) -> tuple[dict[str, int], float]:
        width = max(1, round(left * 10))
        return {"group": width}, width / 10

    def time(kept: Any) -> tuple[Reading, tuple[float, float]]:
        share = 0.2 + 0.8 * kept["group"] / 10
        return Reading(1 / share, 1 / share, 1 / share, 60), (1.0, share)

    kept, trials, best = close(0.5, propose, time)
    assert kept == {"group": 4}
    assert [trial.predicted for trial in trials] == [0.5, 0.4]
    assert best.measured == pytest.approx(0.52)


def test_what_is_exported_to_be_timed_is_a_copy_but_for_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = networks.build("ddpm")
    bench = Bench("onnx", torch.device("cpu"), "fp32", 1, Sizes())
    modules = dict(network.named_modules())
    traced: list[torch.nn.Module] = []

    def stop(denoiser: torch.nn.Module, _axes: object) -> None:
        traced.append(denoiser)
        raise Interrupted("traced", 0)

    monkeypatch.setattr(runtimes, "trace", stop)
    with pytest.raises(Interrupted):
        runtimes.write_network(tmp_path, bench, network)
    own = {weight.data_ptr() for weight in network.parameters()}
    assert {weight.data_ptr() for weight in traced[0].parameters()} == own
    assert dict(network.named_modules()) == modules


def test_a_limit_that_the_table_does_not_know_is_measured_before_anything_is_scored(
    pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Networks that are narrower than those which the table was made with take as long as they do."""
    model, slowest = str(pipeline_folder), 0.0

    def floor(seconds: float) -> float:
        return max(0.0, slowest - seconds)

    machine = Machine(surprise=floor).install(monkeypatch)
    bench = Bench("eager", torch.device("cpu"), "fp32", 4, Sizes())
    dense = machine.network_seconds(bench, gfprune_cli.load(pipeline_folder))
    with pytest.raises(UsageError) as caught:
        gfprune_cli.analyze(model, speedup=[90], time_batch=4)
    said = re.search(r"narrowest the network is (\S+) times", str(caught.value))
    assert said
    believed = float(said[1])
    slowest = dense / (0.9 * believed)
    asked = dict(time_batch=4, out=tmp_path / "out", **ONCE)
    with pytest.raises(UsageError, match=rf"narrowest the network is {0.9 * believed:.3g} times as"):
        gfprune_cli.prune(model, speedup=0.95 * believed, dry_run=True, **asked)
    done = gfprune_cli.prune(model, speedup=0.9 * believed, **asked)
    assert done.time is not None
    assert done.time["measured"]["speedup"] == pytest.approx(0.9 * believed, rel=0.03)
