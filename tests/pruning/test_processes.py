"""`prune` in several processes: what one makes, and what becomes of a run of which a part is stopped."""

import json
from pathlib import Path
from typing import Any

import pipelines
import pytest
import several
import torch
from torch import nn

import gfprune_cli

BRIEF: dict[str, Any] = dict(images=9, sample_steps=2, draws=7, recover=2, device="cpu")
CASES: dict[str, dict[str, Any]] = {
    "taylor": dict(sparsity=0.4, iterations=2),
    "gradient-flow": dict(sparsity=0.4, criterion="gradient-flow-abs", keep_loss=1.5),
    "fisher": dict(sparsity=[0.2, 0.4], criterion="fisher", one_shot=True),
    "diff-pruning": dict(sparsity=0.4, criterion="diff-pruning", recover=0),
}
SCRIPT = """
import json, sys
import gfprune_cli
from gfprune_cli.errors import Interrupted
model, out, cases = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
for name, case in cases.items():
    gfprune_cli.prune(case.pop("model", model), out=f"{out}/{name}", **case)
"""
STOPPED = """
import os, sys, json
import gfprune_cli
from gfprune_cli.errors import GfpruneError, Interrupted
model, out, how, phase, case = sys.argv[1:5] + [json.loads(sys.argv[5])]
refits = 0
def stop(event):
    global refits
    refits += event.phase == phase
    if os.environ["RANK"] == "1" and refits == 12:
        if how == "killed":
            os._exit(9)
        raise Interrupted("stopped by SIGTERM", 15)
try:
    gfprune_cli.prune(model, out=out, progress=stop, **case)
except GfpruneError as error:
    print(type(error).__name__, error)
    sys.exit(error.exit_code)
"""


def script(folder: Path, text: str) -> Path:
    path = folder / "script.py"
    path.write_text(text)
    return path


def vector(folder: Path) -> torch.Tensor:
    return nn.utils.parameters_to_vector(gfprune_cli.load(folder).parameters()).detach()


def assert_same(several_made: Path, one_made: Path) -> None:
    """The same channels, and weights that differ by rounding: least squares and training magnify it."""
    kept = [json.loads((folder / "gfprune.json").read_text())["kept"] for folder in (several_made, one_made)]
    assert kept[0] == kept[1]
    found, expected = vector(several_made), vector(one_made)
    assert float((found - expected).norm() / expected.norm()) < 2e-3


def test_three_processes_make_what_one_makes(pipeline_folder: Path, tmp_path: Path) -> None:
    """Shares of 7 draws, 9 images and 64 samples are uneven; the transformer has layers wider than its rows."""
    dit = pipelines.dit(tmp_path / "dit")
    cases: dict[str, dict[str, Any]] = {name: BRIEF | case for name, case in CASES.items()}
    cases["transformer"] = BRIEF | dict(model=str(dit), sparsity=0.15)
    outputs = tmp_path / "several"
    made = several.run(script(tmp_path, SCRIPT), 3, pipeline_folder, outputs, json.dumps(cases))
    assert [code for code, _ in made] == [0, 0, 0], made[0][1][-2000:]
    for name, case in cases.items():
        out = tmp_path / "one" / name
        gfprune_cli.prune(case.pop("model", pipeline_folder), out=out, **case)
        targets = case["sparsity"] if isinstance(case["sparsity"], list) else [None]
        for target in targets:
            own = name if target is None else f"{name}-{target:g}"
            assert_same(outputs / own, tmp_path / "one" / own)
            record = json.loads((outputs / own / "gfprune.json").read_text())
            assert record["resolved"]["processes"] == 3


@pytest.mark.parametrize(("how", "phase"), [("told", "refit"), ("killed", "refit"), ("told", "finetune")])
def test_what_is_stopped_goes_on_where_all_were(
    pipeline_folder: Path, tmp_path: Path, how: str, phase: str
) -> None:
    """One process is told to stop, or dies, in the middle of a refit or of training: none waits for it."""
    out = tmp_path / "out"
    case = BRIEF | dict(sparsity=0.4, iterations=2, recover=14, resume=True)
    stop = script(tmp_path, STOPPED)
    ended = several.run(stop, 2, pipeline_folder, out, how, phase, json.dumps(case))
    if how == "told":
        assert [code for code, _ in ended] == [143, 143], ended
        assert all("the state is saved" in said or phase == "refit" for _, said in ended)
    else:
        assert [code for code, _ in ended] == [1, 9], ended
        assert "another process of this run has ended" in ended[0][1]
    assert not out.exists()
    resumed = several.run(script(tmp_path, SCRIPT), 2, pipeline_folder, tmp_path, json.dumps({"out": case}))
    assert [code for code, _ in resumed] == [0, 0], resumed
    case.pop("resume")
    gfprune_cli.prune(pipeline_folder, out=tmp_path / "one", **case)
    assert_same(out, tmp_path / "one")
