"""To add a thing is to add a row: each is added here from outside the package, and used by whole commands."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
from annotated_types import Ge
from conftest import ONE_SHOT
from safetensors.torch import save
from transformers_zoo import build_other

import gfprune_cli
from gfprune_cli.cli.options import with_options
from gfprune_cli.deploy import safetensors
from gfprune_cli.deploy.format import Artefact, Format, Job
from gfprune_cli.deploy.formats import FORMATS
from gfprune_cli.deploy.signature import workable
from gfprune_cli.evaluation.command import evaluate
from gfprune_cli.evaluation.measures import Measures
from gfprune_cli.evaluation.metrics import METRICS, Metric
from gfprune_cli.families.family import Family, Request
from gfprune_cli.families.table import FAMILIES
from gfprune_cli.flow.criteria import CRITERIA, Criterion, Evidence
from gfprune_cli.recipes.evaluate import EvalRecipe
from gfprune_cli.recipes.options import Help, option_names
from gfprune_cli.recipes.prune import PruneRecipe
from gfprune_cli.recipes.run_options import Of, RunOptions
from gfprune_cli.structure.cost import COSTS, Cost


@pytest.fixture
def pruning(smallest_folder: Path, tmp_path: Path) -> dict[str, Any]:
    return dict(model=str(smallest_folder), out=tmp_path / "out") | ONE_SHOT | dict(refit=False, recover=0)


def test_a_criterion_is_a_function_and_a_row(
    pruning: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def first_ones(evidence: Evidence) -> dict[str, torch.Tensor]:
        """The lower the number of a unit, the more it matters."""
        return {group.name: torch.arange(group.units, 0, -1).double() for group in evidence.masked.groups}

    monkeypatch.setitem(CRITERIA, "first", Criterion(first_ones, copies=2))
    done = gfprune_cli.prune(criterion="first", sparsity=0.4, **pruning)
    assert done.criterion == "first"
    record = json.loads((tmp_path / "out" / "gfprune.json").read_text())
    assert all(kept[0] == 0 for kept in record["kept"].values())


def test_a_cost_that_a_budget_counts_is_a_row(
    pruning: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here what leaves the layers, in numbers."""
    row = Cost(lambda layer: 0, lambda layer: layer.positions)
    monkeypatch.setitem(COSTS, "activations", row)
    done = gfprune_cli.prune(budget="activations", sparsity=0.3, **pruning)
    assert done.sparsity["of"] == "activations"
    assert 0.3 <= done.sparsity["achieved"] < 0.33


def test_an_export_format_is_a_file_and_a_row(
    pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(job: Job, folder: Path) -> Artefact:
        network = job.network()
        (folder / "weights.bin").write_bytes(save(network.state_dict()))
        signature = workable(job.known(network), job.scheduler, job.dtype)
        run = safetensors.run_model(network, signature, job.dtype)
        return Artefact.of_class(signature, run, folder / "weights.bin")

    row = Format(write=write, files=lambda size: {"weights.bin": size}, loading=lambda job, name: "load()")
    monkeypatch.setitem(FORMATS, "plain", row)
    planned = gfprune_cli.export(str(pipeline_folder), format="plain", dry_run=True)
    assert list(planned.files) == ["weights.bin"]
    done = gfprune_cli.export(str(pipeline_folder), format="plain", out=tmp_path / "out")
    assert done.parity.max_abs == 0
    assert "load()" in (tmp_path / "out" / "README.md").read_text()


def test_a_metric_with_its_gate_is_a_row(pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Recipe(EvalRecipe):
        min_contrast: Annotated[float | None, Ge(0), Help("Exit with 3 if there is less.")] = None

    def contrast(measures: Measures) -> dict[str, dict[str, Any]]:
        images = torch.cat(list(measures.shown("model")))
        return {"contrast": {"value": float(images.std()), "ci95": None, "n": len(images)}}

    monkeypatch.setitem(METRICS, "contrast", Metric("contrast", "spread of grey values", contrast))
    recipe = Recipe(model=str(pipeline_folder), samples=2, steps=2, no_latency=True, min_contrast=9.0)
    result = evaluate(recipe, RunOptions())
    assert result is not None
    assert 0 < result.metrics["contrast"]["value"] < 9
    assert [gate.name for gate in result.missed] == ["min-contrast"]


def test_a_family_is_a_file_and_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a network of the class is given, and so what it costs, is what the row says."""
    model, _ = build_other("QwenImageTransformer2DModel")
    model.float().save_pretrained(tmp_path / "model")

    def inputs(request: Request) -> dict[str, Any]:
        config = request.config
        text = request.text(8, config.joint_attention_dim)
        return {
            "hidden_states": request.zeros(1, 16, config.in_channels),
            "encoder_hidden_states": text,
            "encoder_hidden_states_mask": request.zeros(1, 8) + 1,
            "timestep": request.time(),
            "img_shapes": [(1, 4, 4)],
        }

    unknown = gfprune_cli.analyze(tmp_path / "model")
    family = Family(classes=("QwenImageTransformer2DModel",), inputs=inputs)
    monkeypatch.setattr("gfprune_cli.families.table.FAMILIES", [family, *FAMILIES])
    known = gfprune_cli.analyze(tmp_path / "model", sparsity=[0.3])
    assert known.plan[0].achieved >= 0.3
    assert known.macs < unknown.macs / 10  # 16 tokens, not the 256 of a network that no row is for


def test_a_run_flag_is_a_field() -> None:
    @dataclass(frozen=True, kw_only=True)
    class More(RunOptions):
        patience: Annotated[int, Ge(0), Help("Seconds to wait."), Of("prune")] = 3

    @with_options(PruneRecipe, More)
    def run_prune(**flags: Any) -> None:
        """A command."""

    assert "patience" in option_names(More)
    parameters = run_prune.__signature__.parameters  # type: ignore[attr-defined]
    assert "Seconds to wait. [default: 3]" in str(parameters["patience"].annotation.__metadata__[0].help)
    assert More.resolve(patience=5).patience == 5
