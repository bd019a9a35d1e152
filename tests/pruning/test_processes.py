"""`prune` in several processes: what one makes, and what becomes of a run of which a part is stopped."""

import json
import signal
from pathlib import Path
from typing import Any

import pipelines
import pytest
import torch
from forked import Server
from torch import nn

import gfprune_cli

pytestmark = pytest.mark.slow
BRIEF = ["--images", "9", "--sample-steps", "2", "--draws", "7", "--recover", "2", "--device", "cpu"]
ONE_BY_ONE = {"gfprune_cli.pruning.phases:SCORE_CHUNK": 1}  # one event for each draw that is scored


def vector(folder: Path) -> torch.Tensor:
    return nn.utils.parameters_to_vector(gfprune_cli.load(folder).parameters()).detach()


def record_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "gfprune.json").read_text())
    return found


def assert_same(several_made: Path, one_made: Path) -> None:
    """The same channels; losses and weights differ by rounding, which least squares and training magnify."""
    records = [record_of(folder) for folder in (several_made, one_made)]
    assert records[0]["kept"] == records[1]["kept"]
    losses = [{name: loss for name, loss in record["loss"].items() if loss is not None} for record in records]
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)
    found, expected = vector(several_made), vector(one_made)
    assert float((found - expected).norm() / expected.norm()) < 2e-3


@pytest.mark.matrix(2)
@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ("unet", "--sparsity 0.4 --keep-loss 2"),
        ("unet", "--sparsity 0.2 --sparsity 0.4 --criterion fisher --one-shot --no-refit"),
        pytest.param(
            "unet",
            "--sparsity 0.4 --criterion gradient-flow-abs --one-shot --recover 0",
            marks=pytest.mark.thorough,  # Taylor scores are shared alike
        ),
        ("unet", "--sparsity 0.4 --criterion diff-pruning --one-shot --no-refit --recover 0"),
        ("dit", "--sparsity 0.15 --one-shot --recover 0"),
    ],
)
def test_three_processes_make_what_one_makes(
    server: Server, smallest_folder: Path, tmp_path: Path, model: str, settings: str
) -> None:
    """Shares of 7 draws, 9 images and 16 samples are uneven; the transformer has more inputs than rows."""
    folder = smallest_folder if model == "unet" else pipelines.dit(tmp_path / "dit")
    given = ["prune", "--model", folder, *BRIEF, *settings.split()]
    one = server.run(*given, "--out", tmp_path / "one", constants=ONE_BY_ONE)
    assert one.code == 0, one.stderr
    outcomes = server.together(3, *given, "--out", tmp_path / "several", constants=ONE_BY_ONE)
    assert [outcome.code for outcome in outcomes] == [0, 0, 0], outcomes[0].stderr
    assert outcomes[0].stdout == one.stdout.replace(str(tmp_path / "one"), str(tmp_path / "several"))
    assert [outcome.stdout for outcome in outcomes[1:]] == ["", ""]
    # every process also tells when a scoring is over
    scorings = one.phases.count("score") // (7 + 1)
    assert scorings >= 1
    if "gradient-flow" not in settings and "diff-pruning" not in settings:
        assert [outcome.phases.count("score") for outcome in outcomes] == [
            scorings * (draws + 1) for draws in (2, 2, 3)
        ]
    for made in one.stdout.splitlines():
        several = Path(made.replace(str(tmp_path / "one"), str(tmp_path / "several")))
        assert_same(several, Path(made))
        assert record_of(several)["resolved"]["processes"] == 3
        assert all((folder / "samples.png").exists() for folder in (several, Path(made)))


@pytest.mark.matrix(2)
@pytest.mark.parametrize(
    ("number", "phase"),
    [(signal.SIGTERM, "refit"), (signal.SIGTERM, "finetune"), (signal.SIGKILL, "refit")],
)
def test_what_is_stopped_goes_on_where_all_were(
    server: Server, smallest_folder: Path, tmp_path: Path, number: int, phase: str
) -> None:
    """One process is told to stop, or dies, in the middle of a refit or of training: none waits for it."""
    given = ["prune", "--model", smallest_folder, *BRIEF, "--sparsity", "0.4", "--iterations", "2"]
    given += ["--recover", "14"]
    whole, out = tmp_path / "whole", tmp_path / "out"
    ended = server.together(2, *given, "--out", out, signals={1: number}, phase=phase, nth=11)
    killed = number == signal.SIGKILL
    assert [outcome.code for outcome in ended] == ([1, -number] if killed else [128 + number] * 2), ended
    said = "another process of the run ended" if killed else "the state is saved, continue with --resume"
    assert said in ended[0].error
    assert not out.exists()
    resumed = server.together(2, *given, "--out", out, "--resume")
    assert [outcome.code for outcome in resumed] == [0, 0], resumed[0].stderr
    assert [outcome.code for outcome in server.together(2, *given, "--out", whole)] == [0, 0]
    assert torch.equal(vector(out), vector(whole))
    assert record_of(out)["kept"] == record_of(whole)["kept"]
