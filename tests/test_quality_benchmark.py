"""The benchmark compares like with like: equal parameters, gradients within limits, figures that add up."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import criterion
import peers
import quality
import report_quality
import yardstick

TOY = quality.Form(
    gradients=400,
    seeds=1,
    sparsities=(0.5,),
    methods=quality.METHODS,
    once=quality.CONTROLS,
    samples=4,
    sample_steps=2,
    second_steps=1,
    prune={"iterations": 3, "steps_per_iteration": 1, "draws": 8, "batch": 4, "align": 1},
)


@pytest.fixture(scope="module")
def toy(pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> yardstick.Subject:
    """The tiny pipeline with random pictures."""
    path = tmp_path_factory.mktemp("toy") / "images.npz"
    pictures = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)
    np.savez(path, x=pictures[:8], held_out=pictures[8:])
    return yardstick.subject("toy", str(pipeline_folder), path)


@pytest.mark.parametrize("method", quality.METHODS + quality.CONTROLS)
def test_every_method_keeps_the_same_parameters_within_the_gradients_allowed(
    toy: yardstick.Subject, method: str
) -> None:
    """A budget of MACs keeps other parameters."""
    cell = quality.Cell("toy", method, 0.5, 0)
    run = quality.by_gfprune if method.startswith("gfprune") else quality.by_peer
    model, taken = run(toy, cell, TOY)
    assert TOY.gradients - quality.BATCH < taken <= TOY.gradients
    uniform = peers.pruned_by("random", lambda: copy_of(toy), 0.5, toy.process, draws_of(toy), 0)[0]
    if method in (*quality.PEERS, "gfprune"):
        dense = peers.parameters(toy.dense)
        assert abs(peers.parameters(model) - peers.parameters(uniform)) <= 0.01 * dense
    if method.endswith("MACs of the peers"):
        ratio = quality.macs_of(model, 16) / quality.macs_of(uniform, 16)
        assert ratio == pytest.approx(1, abs=0.05)


def copy_of(toy: yardstick.Subject) -> Any:
    import copy

    return copy.deepcopy(toy.dense)


def draws_of(toy: yardstick.Subject) -> Any:
    from gfprune_cli.data.draws import Draws

    return Draws(yardstick.pictures_of(toy), toy.process.steps, 0)


def test_peers_remove_the_same_index_from_every_group_of_a_norm(toy: yardstick.Subject) -> None:
    """What is compared with is Torch-Pruning's own selection, not ours."""
    model, _ = peers.pruned_by("magnitude", lambda: copy_of(toy), 0.5, toy.process, draws_of(toy), 0)
    groups = toy.dense.config.norm_num_groups  # type: ignore[union-attr]
    kept = torch.isin(toy.dense.conv_in.bias, model.conv_in.bias).view(groups, -1)  # type: ignore[union-attr,arg-type]
    assert kept.any()
    assert not kept.all()
    assert bool((kept == kept[0]).all())


def test_diff_pruning_stops_where_the_loss_gets_small(toy: yardstick.Subject) -> None:
    taken: list[int] = []

    class Watched(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(()))

        def forward(self, x: torch.Tensor, timesteps: torch.Tensor) -> Any:
            """The loss is 1 up to timestep 500 and 0.01 after it."""
            taken.append(int(timesteps[0]))
            batch = draws_of(toy).batch("score", 1, peers.DIFF_PRUNING_IMAGES)
            off = 1.0 if taken[-1] <= 500 else 0.1
            return type("Output", (), {"sample": batch.noise + off * self.weight})

    count = peers.diff_pruning_gradients(Watched(), toy.process, draws_of(toy), 40)
    assert taken == [0, 111, 222, 333, 444, 555]
    assert count == len(taken) * peers.DIFF_PRUNING_IMAGES


def test_a_network_is_at_no_distance_from_itself(toy: yardstick.Subject, tmp_path: Path) -> None:
    cache = tmp_path / "dense.safetensors"
    first = yardstick.Yardstick(toy, 4, 2, draws=16, cache=cache)
    rule = yardstick.Yardstick(toy, 4, 2, draws=16, cache=cache)
    assert torch.equal(first.images, rule.images)
    same = rule.measure(toy.dense)
    assert same["ssim"] == 1
    assert same["fd_teacher"] == pytest.approx(0, abs=1e-6)
    assert [same["loss"], *same["bins"]] == rule.losses.tolist()
    other = rule.measure(
        peers.pruned_by("random", lambda: copy_of(toy), 0.5, toy.process, draws_of(toy), 0)[0]
    )
    assert other["ssim"] < 1
    assert other["fd_teacher"] > 0
    assert other["loss"] == pytest.approx(np.mean(other["bins"]), rel=0.05)


def entry(method: str, sparsity: float, **numbers: float) -> dict[str, Any]:
    start = dict(subject="toy", seed=0, params=100, macs=100, gradients=1, seconds=1, bins=[0.1, 0.2])
    return start | dict(method=method, sparsity=sparsity) | numbers


def test_the_report_compares_with_the_best_published_method_and_not_with_controls(tmp_path: Path) -> None:
    entries = [
        entry("dense", 0.0, loss=0.1, ssim=1.0, fd_teacher=0.0),
        entry("gfprune", 0.5, loss=0.15, ssim=0.9, fd_teacher=1.0),
        entry("magnitude", 0.5, loss=0.3, ssim=0.6, fd_teacher=8.0),
        entry("taylor", 0.5, loss=0.2, ssim=0.5, fd_teacher=10.0),
        entry("diff-pruning, distilled", 0.5, loss=0.12, ssim=0.95, fd_teacher=0.5),
    ]
    page = report_quality.write_report(entries, TOY, tmp_path, command="the command").read_text()
    assert "the command" in page
    assert "best peer (Torch-Pruning, Taylor) 0.1: 50% of it" in page
    assert "best peer (Torch-Pruning, magnitude) 0.4: 25% of it" in page
    assert "best peer (Torch-Pruning, magnitude) 8: 12% of it" in page
    assert (tmp_path / "quality.svg").stat().st_size > 1000


def test_runs_that_are_done_are_not_repeated_and_those_of_another_form_do_not_count(tmp_path: Path) -> None:
    path, cell = tmp_path / "results.jsonl", quality.Cell("toy", "gfprune", 0.5, 0)
    quality.Store(path, TOY).add(cell, {"loss": 1.0})
    assert quality.Store(path, TOY).found[cell.key]["loss"] == 1.0
    assert not quality.Store(path, replace(TOY, gradients=1)).found
    assert json.loads(path.read_text())["key"] == cell.key


@pytest.mark.parametrize("name", criterion.STUDIES)
def test_every_study_of_the_criterion_gives_a_loss_per_variant_and_sparsity(
    toy: yardstick.Subject, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(criterion, "MEASURED", 16)
    bench = criterion.Bench.open(toy, 0)
    dense = bench.loss()
    rows = criterion.study(name, bench, [0.3, 0.6], 32)
    assert len(rows) >= 6
    for losses in rows.values():
        assert len(losses) == 2
        assert all(np.isfinite(losses))
        assert losses != [dense, dense]
    assert bench.loss() == dense


def test_the_second_model_has_other_widths_and_other_images(tmp_path: Path) -> None:
    """Trained by the benchmark, once."""
    quality.train_second(tmp_path, 1)
    second = quality.open_subject("second", tmp_path)
    demo = yardstick.demo()
    assert second.dense.config.block_out_channels != demo.dense.config.block_out_channels  # type: ignore[union-attr]
    assert len(second.held_out) >= 40
    pictures = {image.numpy().tobytes() for image in yardstick.pictures_of(demo)}
    assert not any(image.numpy().tobytes() in pictures for image in yardstick.pictures_of(second))
    weights = (tmp_path / "second" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    quality.train_second(tmp_path, 1)
    assert (tmp_path / "second" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == weights


SCRIPTS = sorted(Path(quality.__file__).parent.glob("*.py"))


@pytest.mark.parametrize(
    "script", [path for path in SCRIPTS if "def main(" in path.read_text()], ids=lambda path: path.name
)
def test_a_script_with_a_main_calls_it(script: Path) -> None:
    assert 'if __name__ == "__main__":' in script.read_text()
