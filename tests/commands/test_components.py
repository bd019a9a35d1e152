"""Pipelines with several denoisers: each is pruned to the same budget, in one command and one output."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import Gfprune
from pipelines import wan_22
from test_prune import files

import gfprune_cli
from gfprune_cli.carrying.target import find_target
from gfprune_cli.checkpoint.record import read_record, records_of
from gfprune_cli.errors import Interrupted, UsageError
from gfprune_cli.progress import Event, silent
from gfprune_cli.pruning.result import PruneResults
from gfprune_cli.recipes.carry import CarryRecipe
from gfprune_cli.recipes.run_options import RunOptions

RUNS: dict[Path, PruneResults] = {}
BOTH = ["transformer", "transformer_2"]
BRIEF: dict[str, Any] = dict(
    component="all", sparsity=0.3, images=4, sample_steps=1, draws=2, recover=1, size="16x16", frames=1
)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wan_22(tmp_path_factory.mktemp("wan") / "dense")


@pytest.fixture
def pruned(dense: Path) -> tuple[Path, PruneResults]:
    """Both experts, pruned once for all the tests of this module."""
    out = dense.with_name("out")
    if out not in RUNS:
        result = gfprune_cli.prune(str(dense), out=out, **BRIEF)
        assert isinstance(result, PruneResults)
        RUNS[out] = result
    return out, RUNS[out]


@pytest.mark.thorough  # the stopped run prunes both
def test_every_denoiser_reaches_the_budget_in_one_checkpoint(
    dense: Path, pruned: tuple[Path, PruneResults]
) -> None:
    out, result = pruned
    assert [network.component for network in result.networks] == BOTH
    for network in result.networks:
        assert network.output == str(out)
        assert 0 <= network.sparsity["achieved"] - 0.3 <= 0.01
        assert network.loss["removed"] == pytest.approx(network.loss["masked"], rel=1e-4)
        model = gfprune_cli.load(str(out), component=network.component)
        assert sum(parameter.numel() for parameter in model.parameters()) == network.params["after"]
    card = (out / "README.md").read_text()
    record = json.loads((out / "gfprune.json").read_text())
    assert (record["component"], list(record["others"])) == ("transformer", ["transformer_2"])
    assert record["recipe"]["component"] == "all"
    assert all(f"## {name}" in card for name in BOTH)
    assert sorted(path.name for path in out.parent.iterdir()) == ["dense", "out"], (
        "no state and no part is left"
    )


PLAIN = """
import sys
sys.modules["gfprune_cli"] = None
import torch
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
for steps in (pipeline.transformer, pipeline.transformer_2):
    print(sum(parameter.numel() for parameter in steps.parameters()))
pipeline("a fox", height=32, width=32, num_frames=9, num_inference_steps=4, max_sequence_length=16,
         output_type="latent")
"""


def test_plain_diffusers_loads_and_runs_both(pruned: tuple[Path, PruneResults]) -> None:
    out, result = pruned
    environment = {key: value for key, value in os.environ.items() if key != "DIFFUSERS_DISABLE_REMOTE_CODE"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PLAIN, str(out)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == [str(network.params["after"]) for network in result.networks]


def test_the_record_of_each_serves_finetuning(pruned: tuple[Path, PruneResults], tmp_path: Path) -> None:
    """The second one finds its own channels and teacher; the record of the first travels on."""
    out, _ = pruned
    small: dict[str, Any] = dict(images=4, sample_steps=1, batch=2, sample_every=0, size="16x16", frames=1)
    done = gfprune_cli.finetune(out, component="transformer_2", out=tmp_path / "tuned", steps=1, **small)
    assert done.loss["after"] is not None
    record = json.loads((tmp_path / "tuned" / "gfprune.json").read_text())
    assert (record["component"], list(record["others"])) == ("transformer_2", ["transformer"])
    assert record["finetune"]
    assert "finetune" not in record["others"]["transformer"]


def test_a_stopped_run_goes_on_to_the_same_bytes(
    dense: Path, pruned: tuple[Path, PruneResults], tmp_path: Path
) -> None:
    """A network that is made is not made again; without --resume what was left is refused."""
    out = tmp_path / "out"
    first = tmp_path / ".out.gfprune-state" / "parts" / "transformer" / "gfprune.json"

    def stop(event: Event) -> None:
        if first.exists():
            raise Interrupted("stop", signal.SIGTERM)

    with pytest.raises(Interrupted):
        gfprune_cli.prune(str(dense), out=out, progress=stop, **BRIEF)
    with pytest.raises(UsageError, match="continue it with --resume"):
        gfprune_cli.prune(str(dense), out=out, **BRIEF)
    made = first.stat().st_mtime_ns
    seen: list[int] = []

    def look(event: Event) -> None:
        seen.extend([first.stat().st_mtime_ns] if first.exists() else [])

    gfprune_cli.prune(str(dense), out=out, resume=True, progress=look, **BRIEF)
    assert set(seen) == {made}
    assert files(out) == files(pruned[0])


def test_plans_and_refusals_say_all(dense: Path, gfprune: Gfprune, pipeline_folder: Path) -> None:
    shared = ["--model", str(dense), "--component", "all", "--json"]
    shown = json.loads(gfprune("analyze", *shared, "--sparsity", "0.3").stdout)
    assert [network["component"] for network in shown["networks"]] == BOTH
    planned = json.loads(gfprune("prune", *shared, "--sparsity", "0.3", "--dry-run").stdout)
    assert [network["component"] for network in planned["networks"]] == BOTH
    assert all(abs(network["sparsity"]["achieved"] - 0.3) < 0.01 for network in planned["networks"])
    with pytest.raises(UsageError, match="give --sparsity once"):
        gfprune_cli.prune(str(dense), component="all", sparsity=(0.2, 0.3))


@pytest.mark.parametrize(
    ("name", "reason"), [("vae", "AutoencoderKLWan decodes videos"), ("text_encoder", "choose")]
)
def test_a_component_that_is_not_pruned_is_refused_with_the_reason(
    dense: Path, name: str, reason: str
) -> None:
    with pytest.raises(UsageError, match=reason):
        gfprune_cli.analyze(str(dense), component=name)


def test_experts_pruned_one_after_the_other_are_both_on_record(dense: Path, tmp_path: Path) -> None:
    """At sparsities of their own; each is the teacher's pupil of its own record."""
    brief = BRIEF | dict(recover=0, refit=False, fold=0)
    first, second = tmp_path / "first", tmp_path / "second"
    gfprune_cli.prune(str(dense), out=first, **brief | dict(component="transformer"))
    gfprune_cli.prune(str(first), out=second, **brief | dict(component="transformer_2", sparsity=0.2))
    assert sorted(records_of(second)) == BOTH
    for name, sparsity in zip(BOTH, (0.3, 0.2), strict=True):
        record = read_record(second, name)
        assert record is not None
        assert record.component == name
        assert record.document["sparsity"]["target"] == sparsity


def test_an_adapter_is_carried_to_the_expert_that_it_is_for(pruned: tuple[Path, PruneResults]) -> None:
    out, _ = pruned
    for name in BOTH:
        recipe = CarryRecipe(adapter="a.safetensors", model=str(out), component=name)
        target = find_target(recipe, RunOptions(offline=True), silent)
        assert (target.record.component, target.component.name) == (name, name)
    with pytest.raises(UsageError, match="--component vae was not pruned: transformer was"):
        find_target(
            CarryRecipe(adapter="a", model=str(out), component="vae"), RunOptions(offline=True), silent
        )
