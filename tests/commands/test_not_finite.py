"""Values that are not finite: the error names the timestep, or the schedule, that they come from.

pytest tests/test_not_finite.py
"""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel

import gfprune_cli
from gfprune_cli.diffusion.finite import zero_levels
from gfprune_cli.diffusion.schedulers import noising_process
from gfprune_cli.diffusion.variance import VariancePreserving
from gfprune_cli.errors import GfpruneError
from gfprune_cli.evaluation import job as evaluation_run
from gfprune_cli.recovery import job as recovery_run

LEVELS = 16  # of the schedule: stratified draws meet every one of them
BRIEF: dict[str, Any] = dict(images=8, sample_steps=2)
PRUNE: dict[str, Any] = BRIEF | dict(sparsity=0.3, draws=LEVELS, recover=0, refit=False)
AT_ZERO = r"not finite at timestep 0, and finite at the other \d+ noise levels tried: check the checkpoint"


def saved(folder: Path, scheduler: Any, **changes: Any) -> Path:
    torch.manual_seed(0)
    DDPMPipeline(UNet2DModel(**TINY | changes), scheduler).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def fourier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fourier time features take the logarithm of the timestep; this schedule begins at 0."""
    folder = tmp_path_factory.mktemp("fourier") / "model"
    return saved(folder, DDPMScheduler(num_train_timesteps=LEVELS), time_embedding_type="fourier")


@pytest.fixture(scope="module")
def zero_snr(tmp_path_factory: pytest.TempPathFactory) -> Path:
    scheduler = DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False)
    return saved(tmp_path_factory.mktemp("zero") / "model", scheduler)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("data") / "images.npz"
    np.savez(path, np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), dtype=np.uint8))
    return str(path)


def test_a_reported_loss_names_the_timestep(fourier: Path, tmp_path: Path) -> None:
    with pytest.raises(GfpruneError, match=f"a reported loss is {AT_ZERO}"):
        gfprune_cli.prune(str(fourier), out=tmp_path / "out", **PRUNE)


def test_scores_name_the_timestep(fourier: Path) -> None:
    with pytest.raises(GfpruneError, match=f"the loss is {AT_ZERO}"):
        gfprune_cli.analyze(str(fourier), sensitivity=True)


def test_training_names_the_timestep_of_the_dense_model(
    fourier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the learning rate. The reported losses are over one draw, which does not meet timestep 0."""
    from gfprune_cli.pruning import flows
    from gfprune_cli.pruning import job as pruning_run

    monkeypatch.setattr(pruning_run.PruneJob.loss, "__defaults__", (1,))
    monkeypatch.setattr(flows, "JUDGE_DRAWS", 1)
    monkeypatch.setattr(recovery_run, "REPORT_DRAWS", 1)
    pruned = gfprune_cli.prune(str(fourier), out=tmp_path / "out", **PRUNE | dict(criterion="magnitude"))
    with pytest.raises(GfpruneError, match=f"the dense model's output is {AT_ZERO}"):
        gfprune_cli.finetune(
            str(pruned.output), out=tmp_path / "tuned", steps=8, batch=LEVELS, sample_every=0, **BRIEF
        )


def test_samples_name_the_timestep(fourier: Path) -> None:
    with pytest.raises(GfpruneError, match="the network's output at timestep 0 is not finite"):
        gfprune_cli.evaluate(str(fourier), samples=2, steps=2, timestep_spacing="leading", no_latency=True)


@pytest.mark.parametrize("command", ["prune", "eval", "eval, its own sampler"])
def test_an_epsilon_prediction_at_zero_snr_is_refused_before_anything_is_drawn(
    zero_snr: Path, tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(VariancePreserving, "sample", lambda *_: pytest.fail("images were drawn"))
    monkeypatch.setattr(evaluation_run, "draw_all", lambda *_: pytest.fail("images were drawn"))
    own: dict[str, Any] = dict(sampler="pipeline") if "own" in command else {}
    run: Any = partial(gfprune_cli.evaluate, samples=2, steps=2, no_latency=True, **own)
    if command == "prune":
        run = partial(gfprune_cli.prune, out=tmp_path / "out", **PRUNE)
    with pytest.raises(GfpruneError, match=r"zero terminal SNR.*rescale_betas_zero_snr or prediction_type"):
        run(str(zero_snr))


def test_what_the_refusal_advises_works(zero_snr: Path, data: str, tmp_path: Path) -> None:
    pruned = gfprune_cli.prune(str(zero_snr), out=tmp_path / "out", **PRUNE | dict(data=data))
    assert pruned.loss["removed"] is not None
    tuned = gfprune_cli.finetune(
        str(pruned.output), out=tmp_path / "tuned", steps=1, batch=2, data=data, **BRIEF
    )
    assert tuned.loss["after"] is not None
    assert not list((tmp_path / "tuned-logs").rglob("*.png")), "no picture can be drawn"
    evaluated = gfprune_cli.evaluate(
        str(pruned.output), samples=2, steps=2, timestep_spacing="leading", no_latency=True
    )
    assert evaluated.document()["metrics"]["ssim"]["value"] is not None


@pytest.mark.parametrize(
    ("settings", "levels"),
    [
        (dict(prediction_type="epsilon", clip_sample=False), [999]),
        (dict(prediction_type="v_prediction", clip_sample=False), []),
        (dict(prediction_type="sample", clip_sample=False), []),
        (dict(prediction_type="epsilon", clip_sample=True), []),  # clipping makes an image of it
    ],
)
def test_only_predictions_of_noise_need_some_signal(settings: dict[str, Any], levels: list[int]) -> None:
    assert zero_levels(noising_process(DDIMScheduler(rescale_betas_zero_snr=True, **settings))) == levels
    assert zero_levels(noising_process(DDIMScheduler(**settings))) == []
