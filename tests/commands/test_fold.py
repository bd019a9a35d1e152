"""`prune --fold` end to end on a tiny pipeline: recorded, loaded elsewhere, trained and pruned again."""

import json
import signal
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import QUICK
from diffusers import AutoModel
from twins import assert_same

import gfprune_cli
from gfprune_cli.checkpoint.modeling.gfprune_models_v2 import FactoredLinear
from gfprune_cli.errors import Interrupted, UsageError
from gfprune_cli.progress import Event
from gfprune_cli.pruning import job


@pytest.fixture(scope="module")
def folded_out(pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pipeline, folded and nothing else."""
    out = tmp_path_factory.mktemp("folded") / "out"
    gfprune_cli.prune(str(pipeline_folder), sparsity=0, fold=0.02, out=out, images=8, sample_steps=2)
    return out


def test_folding_alone_trains_nothing_and_is_recorded(pipeline_folder: Path, folded_out: Path) -> None:
    record = json.loads((folded_out / "gfprune.json").read_text())
    fold_, params = record["fold"], record["params"]
    assert params == fold_["params"]
    assert params["after"] < params["before"]
    assert fold_["tolerance"] == 0.02 >= fold_["layer_error"] > 0
    assert fold_["output_error"] < 0.1
    assert record["loss"]["recovered"] is None
    assert record["scoring_gradients"] == 0
    assert "factored" in (folded_out / "README.md").read_text()
    dense: Any = gfprune_cli.load(pipeline_folder)
    network: Any = gfprune_cli.load(folded_out)
    left = dense.state_dict()
    for name, tensor in network.state_dict().items():
        assert name not in left or torch.equal(tensor, left[name])
    elsewhere = AutoModel.from_pretrained(str(folded_out / "unet"), trust_remote_code=True)
    assert_same(elsewhere, network, torch.randn(1, 3, 16, 16), 7)


def test_eval_says_what_the_record_says_of_folding(folded_out: Path, pipeline_folder: Path) -> None:
    record = json.loads((folded_out / "gfprune.json").read_text())["fold"]
    fast: dict[str, Any] = dict(samples=2, steps=1, no_latency=True)
    found = gfprune_cli.evaluate(str(folded_out), **fast).document()["fold"]
    assert found["layers"] == len(record["layers"])
    assert all(found[key] == record[key] for key in ("tolerance", "params", "layer_error", "output_error"))
    assert gfprune_cli.evaluate(str(pipeline_folder), **fast).document()["fold"] is None


def test_a_budget_that_folding_meets_alone_takes_no_channel(pipeline_folder: Path, tmp_path: Path) -> None:
    result = gfprune_cli.prune(
        str(pipeline_folder), out=tmp_path / "out", sparsity=0.01, budget="params", fold=0.05,
        **QUICK | {"recover": 0},
    )  # fmt: skip
    assert result.sparsity["params"] > 0.02
    assert result.params["after"] == result.fold["params"]["after"]


def test_the_folded_network_is_gone_when_recovery_reads_what_teaches(
    pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the narrow network there is then one dense one, the teacher, as memory was planned."""
    fold, load, folded, alive = job.PruneJob.fold, job.PruneJob.load, [], []

    def seen(*given: Any) -> Any:
        folded.append(weakref.ref(found := fold(*given)))
        return found

    def counted(run: Any) -> Any:
        alive.extend(one() is not None for one in folded)
        return load(run)

    monkeypatch.setattr(job.PruneJob, "fold", seen)
    monkeypatch.setattr(job.PruneJob, "load", counted)
    settings: dict[str, Any] = dict(sparsity=0.3, budget="params", fold=0.05, **QUICK | {"iterations": 1})
    result = gfprune_cli.prune(str(pipeline_folder), out=tmp_path / "out", **settings)
    assert result.fold
    assert alive == [False]


@pytest.mark.slow
def test_a_run_stopped_while_it_folds_and_while_it_trains_resumes_to_the_same_bytes(
    pipeline_folder: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = dict(sparsity=0.3, budget="params", fold=0.05, **QUICK | {"iterations": 1})
    gfprune_cli.prune(str(pipeline_folder), out=tmp_path / "whole", **settings)
    left = ["fold", "finetune"]

    def stop(event: Event) -> None:
        if left and event.phase == left[0]:
            left.pop(0)
            raise Interrupted("stop", signal.SIGTERM)

    for number in range(2):
        with pytest.raises(Interrupted):
            gfprune_cli.prune(
                str(pipeline_folder), out=tmp_path / "out", resume=number > 0, progress=stop, **settings
            )
    gfprune_cli.prune(str(pipeline_folder), out=tmp_path / "out", resume=True, **settings)
    for name in ("unet/diffusion_pytorch_model.safetensors", "gfprune.json", "unet/config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.slow
def test_folded_checkpoints_are_trained_exported_and_pruned_again(
    folded_out: Path, tmp_path: Path, thorough: bool
) -> None:
    result = gfprune_cli.finetune(
        str(folded_out), steps=1, images=8, sample_steps=2, out=tmp_path / "trained"
    )
    network = gfprune_cli.load(str(result.output))
    assert any(isinstance(part, FactoredLinear) for part in network.modules())
    form = "onnx" if thorough else "safetensors"  # two factors are traced as any two layers are
    assert gfprune_cli.export(str(folded_out), format=form, out=tmp_path / "graph").parity.inputs > 0
    again = gfprune_cli.prune(str(folded_out), sparsity=0.3, out=tmp_path / "again", **QUICK)
    assert again.params["after"] < 0.72 * again.params["before"]
    gfprune_cli.load(str(again.output))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(sparsity=0, fold=0), "--sparsity 0 removes nothing"),
        (dict(layout="native", fold=0.01), "--layout native: the stock classes know no factors"),
    ],
)
def test_settings_that_fold_nothing_are_refused(
    pipeline_folder: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        gfprune_cli.prune(str(pipeline_folder), dry_run=True, **settings)
