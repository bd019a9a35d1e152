"""`prune` in several processes: what one makes, and what becomes of a run of which a part is stopped."""

import itertools
import json
import os
import signal
from pathlib import Path
from typing import Any

import draws
import pipelines
import pytest
import several
import torch
from torch import nn

import gfprune_cli
from gfprune_cli.errors import Interrupted
from gfprune_cli.progress import Event

BRIEF: dict[str, Any] = dict(images=9, sample_steps=2, draws=7, recover=2, device="cpu")
CASES: dict[str, dict[str, Any]] = {
    "taylor": dict(sparsity=0.4, keep_loss=2.0),
    "gradient-flow": dict(sparsity=0.4, criterion="gradient-flow-abs", one_shot=True, recover=0),
    "fisher": dict(sparsity=[0.2, 0.4], criterion="fisher", one_shot=True, refit=False),
    "diff-pruning": dict(sparsity=0.4, criterion="diff-pruning", one_shot=True, refit=False, recover=0),
}


def make(model: Path, out: Path, cases: dict[str, dict[str, Any]], thorough: bool) -> None:
    """Every case, from its own model or this one."""
    if not thorough:
        draws.few_draws()
    for name, case in cases.items():
        settings = dict(case)
        gfprune_cli.prune(settings.pop("model", model), out=out / name, **settings)


def make_and_stop(model: Path, out: Path, how: str, phase: str, case: dict[str, Any], thorough: bool) -> None:
    """One case, of which the second process is told to stop, or dies, at the twelfth event of a phase."""
    if not thorough:
        draws.few_draws()
    seen = itertools.count(1)

    def stop(event: Event) -> None:
        if event.phase == phase and next(seen) == 12 and os.environ["RANK"] == "1":
            if how == "killed":
                os._exit(9)
            raise Interrupted("stopped by SIGTERM", signal.SIGTERM)

    gfprune_cli.prune(model, out=out, progress=stop, **case)


def vector(folder: Path) -> torch.Tensor:
    return nn.utils.parameters_to_vector(gfprune_cli.load(folder).parameters()).detach()


def assert_same(several_made: Path, one_made: Path) -> None:
    """The same channels, and weights that differ by rounding: least squares and training magnify it."""
    kept = [json.loads((folder / "gfprune.json").read_text())["kept"] for folder in (several_made, one_made)]
    assert kept[0] == kept[1]
    found, expected = vector(several_made), vector(one_made)
    assert float((found - expected).norm() / expected.norm()) < 2e-3


@pytest.mark.slow
def test_three_processes_make_what_one_makes(pipeline_folder: Path, tmp_path: Path, thorough: bool) -> None:
    """Shares of 7 draws, 9 images and 16 samples are uneven; a transformer has more inputs than rows."""
    dit = pipelines.dit(tmp_path / "dit")
    chosen = CASES if thorough else {name: CASES[name] for name in ("taylor", "gradient-flow")}
    cases: dict[str, dict[str, Any]] = {name: BRIEF | case for name, case in chosen.items()}
    cases["transformer"] = BRIEF | dict(model=str(dit), sparsity=0.15, one_shot=True, recover=0)
    outputs = tmp_path / "several"
    made = several.run(make, 3, pipeline_folder, outputs, cases, thorough)
    assert [code for code, _ in made] == [0, 0, 0], made
    for name, case in cases.items():
        out = tmp_path / "one" / name
        gfprune_cli.prune(case.pop("model", pipeline_folder), out=out, **case)
        targets = case["sparsity"] if isinstance(case["sparsity"], list) else [None]
        for target in targets:
            own = name if target is None else f"{name}-{target:g}"
            assert_same(outputs / own, tmp_path / "one" / own)
            record = json.loads((outputs / own / "gfprune.json").read_text())
            assert record["resolved"]["processes"] == 3


@pytest.mark.slow
@pytest.mark.matrix(2)
@pytest.mark.parametrize(("how", "phase"), [("told", "refit"), ("told", "finetune"), ("killed", "refit")])
def test_what_is_stopped_goes_on_where_all_were(
    pipeline_folder: Path, tmp_path: Path, how: str, phase: str, thorough: bool
) -> None:
    """One process is told to stop, or dies, in the middle of a refit or of training: none waits for it."""
    out = tmp_path / "out"
    case = BRIEF | dict(sparsity=0.4, iterations=2, recover=14, resume=True)
    ended = several.run(make_and_stop, 2, pipeline_folder, out, how, phase, case, thorough)
    if how == "told":
        assert [code for code, _ in ended] == [143, 143], ended
        assert all("the state is saved" in said or phase == "refit" for _, said in ended)
    else:
        assert [code for code, _ in ended] == [1, 9], ended
        assert "another process of the run ended" in ended[0][1]
    assert not out.exists()
    resumed = several.run(make, 2, pipeline_folder, tmp_path, {"out": case}, thorough)
    assert [code for code, _ in resumed] == [0, 0], resumed
    case.pop("resume")
    gfprune_cli.prune(pipeline_folder, out=tmp_path / "one", **case)
    assert_same(out, tmp_path / "one")
