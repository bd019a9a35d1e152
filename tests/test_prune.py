"""`prune` end to end on a tiny pipeline: what is written, loads elsewhere, repeats and resumes."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import QUICK, TINY, Gfprune, quick_flags
from safetensors import SafetensorError, safe_open

import gfprune_cli
from gfprune_cli.errors import GfpruneError, Interrupted, UsageError
from gfprune_cli.progress import Event

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"

LOAD_ELSEWHERE = """
import sys
sys.modules["gfprune_cli"] = None  # an environment without gfprune
import torch
from diffusers import AutoModel, DiffusionPipeline
out, saved, half, results = sys.argv[1:]
x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
pipeline = DiffusionPipeline.from_pretrained(out, trust_remote_code=True)
found = {"pipeline": pipeline.unet(x, 7).sample}
found["auto"] = AutoModel.from_pretrained(out + "/unet", trust_remote_code=True)(x, 7).sample
pipeline.save_pretrained(saved)
found["saved"] = DiffusionPipeline.from_pretrained(saved, trust_remote_code=True).unet(x, 7).sample
pipeline.to(torch.float16).save_pretrained(half, variant="fp16")
options = dict(variant="fp16", torch_dtype=torch.float16)
again = DiffusionPipeline.from_pretrained(half, trust_remote_code=True, **options)
assert again.unet.dtype == torch.float16
for name, tensor in again.unet.state_dict().items():
    assert torch.equal(tensor, pipeline.unet.state_dict()[name]), name
image = DiffusionPipeline.from_pretrained(saved, trust_remote_code=True)(num_inference_steps=2).images[0]
assert image.size == (16, 16)
torch.save({name: tensor.detach() for name, tensor in found.items()}, results)
"""


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def pruned(pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pipeline, half of its parameters gone."""
    out = tmp_path_factory.mktemp("pruned") / "out"
    gfprune_cli.prune(str(pipeline_folder), sparsity=0.5, out=out, **QUICK)
    return out


def run_elsewhere(script: str, *arguments: object) -> None:
    environment = dict(os.environ)
    environment.pop("DIFFUSERS_DISABLE_REMOTE_CODE", None)
    subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], check=True, env=environment, timeout=300
    )


def test_adaptive_output_loads_without_gfprune_and_survives_saving(pruned: Path, tmp_path: Path) -> None:
    """Bit-identical through DiffusionPipeline, AutoModel, save_pretrained and an fp16 variant."""
    results = tmp_path / "results.pt"
    run_elsewhere(LOAD_ELSEWHERE, pruned, tmp_path / "saved", tmp_path / "half", results)
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    expected = gfprune_cli.load(pruned)(x, 7).sample
    for name, output in torch.load(results, weights_only=True).items():
        assert torch.equal(output, expected), name


def test_native_output_loads_in_the_stock_class_without_a_flag(pipeline_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "native"
    result = gfprune_cli.prune(str(pipeline_folder), sparsity=0.4, layout="native", out=out, **QUICK)
    script = (
        "import sys; sys.modules['gfprune_cli'] = None\n"
        "from diffusers import DDPMPipeline, UNet2DModel\n"
        "unet = DDPMPipeline.from_pretrained(sys.argv[1]).unet\n"
        "assert type(unet) is UNet2DModel\n"
        "assert sum(p.numel() for p in unet.parameters()) == int(sys.argv[2])"
    )
    run_elsewhere(script, out, result.params["after"])
    assert not list(out.rglob("*.py"))
    assert result.class_name == "UNet2DModel"


def test_the_record_names_everything_needed_to_repeat_the_run(pruned: Path, pipeline_folder: Path) -> None:
    record = json.loads((pruned / "gfprune.json").read_text())
    assert record["recipe"]["sparsity"] == 0.5
    source = pipeline_folder / WEIGHTS
    assert record["source"]["weights"] == {source.name: hashlib.sha256(source.read_bytes()).hexdigest()}
    model = gfprune_cli.load(pruned)
    assert record["params"]["after"] == sum(parameter.numel() for parameter in model.parameters())
    assert record["bytes"]["after"] == (pruned / WEIGHTS).stat().st_size
    assert model.conv_in.out_channels == len(record["kept"]["conv_in"])
    assert abs(record["loss"]["removed"] - record["loss"]["masked"]) <= 1e-4 * record["loss"]["masked"]


def test_no_pickle_and_ordinary_modes(pruned: Path) -> None:
    suffixes = {path.suffix for path in pruned.rglob("*") if path.is_file()}
    assert suffixes == {".json", ".md", ".py", ".safetensors"}
    mask = os.umask(0)
    os.umask(mask)
    assert {path.stat().st_mode & 0o777 for path in pruned.rglob("*") if path.is_file()} == {0o666 & ~mask}


def test_same_seed_same_bytes_and_another_seed_differs(
    pruned: Path, pipeline_folder: Path, tmp_path: Path
) -> None:
    for seed, same in ((0, True), (1, False)):
        out = tmp_path / f"seed{seed}"
        gfprune_cli.prune(str(pipeline_folder), sparsity=0.5, out=out, seed=seed, **QUICK)
        assert (digest(out) == digest(pruned)) is same


def test_the_written_recipe_reproduces_the_output(pruned: Path, tmp_path: Path, gfprune: Gfprune) -> None:
    recipe = json.loads((pruned / "gfprune.json").read_text())["recipe"]
    config = tmp_path / "recipe.yaml"
    config.write_text(json.dumps(recipe))
    done = gfprune("prune", "--config", config, "--out", tmp_path / "again")
    assert done.returncode == 0, done.stderr
    assert digest(tmp_path / "again") == digest(pruned)


@pytest.mark.parametrize("stop_at", [1, 2, 4, 6, 10])
def test_a_stopped_run_resumes_to_the_same_bytes(
    pruned: Path, pipeline_folder: Path, tmp_path: Path, stop_at: int
) -> None:
    seen = 0

    def stop(event: Event) -> None:
        nonlocal seen
        seen += event.phase in ("score", "train")
        if seen == stop_at:
            raise Interrupted("stop", signal.SIGTERM)

    out = tmp_path / "out"
    with pytest.raises(Interrupted):
        gfprune_cli.prune(str(pipeline_folder), sparsity=0.5, out=out, report=stop, **QUICK)
    assert not out.exists()
    with pytest.raises(UsageError, match="--resume"):
        gfprune_cli.prune(str(pipeline_folder), sparsity=0.5, out=out, **QUICK)
    with pytest.raises(UsageError, match="other sparsity"):
        gfprune_cli.prune(str(pipeline_folder), sparsity=0.4, out=out, resume=True, **QUICK)
    gfprune_cli.prune(str(pipeline_folder), sparsity=0.5, out=out, resume=True, **QUICK)
    assert digest(out) == digest(pruned)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_process_resumes_to_the_same_bytes(
    pruned: Path, pipeline_folder: Path, tmp_path: Path, gfprune: Gfprune, number: signal.Signals
) -> None:
    out = tmp_path / "out"
    command = [
        "prune",
        "--model",
        str(pipeline_folder),
        "--sparsity",
        "0.5",
        "--out",
        str(out),
        *quick_flags(),
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "gfprune_cli", *command],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("train 3/"):
            process.send_signal(number)
            break
    process.communicate(timeout=60)
    assert process.returncode == (143 if number == signal.SIGTERM else -signal.SIGKILL)
    assert not out.exists()
    done = gfprune(*command, "--resume")
    assert done.returncode == 0, done.stderr
    assert digest(out) == digest(pruned)


def test_resuming_a_finished_run_says_the_same_again(pipeline_folder: Path, tmp_path: Path) -> None:
    """A job that is killed after the output appeared, and repeated, succeeds; only on its own output."""
    data, out = tmp_path / "data.npz", tmp_path / "out"
    np.savez(data, x=np.zeros((8, 16, 16, 3), np.uint8))
    settings: dict[str, Any] = dict(data=str(data), out=out, one_shot=True, draws=8, images=8)
    first = gfprune_cli.prune(str(pipeline_folder), sparsity=0.5, **settings)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    phases = []
    again = gfprune_cli.prune(
        str(pipeline_folder),
        sparsity=0.5,
        resume=True,
        report=lambda event: phases.append(event.phase),
        **settings,
    )
    times: dict[str, Any] = dict(seconds=0, seconds_by_phase={})
    assert replace(again, **times) == replace(first, **times)
    assert not {"score", "train", "remove", "write"} & set(phases)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    with pytest.raises(UsageError, match="another run"):
        gfprune_cli.prune(str(pipeline_folder), sparsity=0.4, resume=True, **settings)
    np.savez(data, x=np.full((8, 16, 16, 3), 9, np.uint8))
    with pytest.raises(UsageError, match="another run"):
        gfprune_cli.prune(str(pipeline_folder), sparsity=0.5, resume=True, **settings)


def test_a_pruned_checkpoint_can_be_pruned_again(pruned: Path, tmp_path: Path) -> None:
    """Uneven norms are traced, masked and narrowed like plain ones, and removal stays exact."""
    result = gfprune_cli.prune(str(pruned), sparsity=0.2, out=tmp_path / "twice", **QUICK)
    masked, removed = result.loss["masked"], result.loss["removed"]
    assert masked is not None
    assert removed is not None
    assert abs(removed - masked) <= 1e-4 * masked
    model = gfprune_cli.load(tmp_path / "twice")
    assert sum(parameter.numel() for parameter in model.parameters()) == result.params["after"]


@pytest.mark.parametrize("layout", ["flat", "bare", "latent", "variance-exploding", "v-prediction"])
def test_other_layouts_and_schedulers(tmp_path: Path, layout: str) -> None:
    from diffusers import DDIMScheduler, DDPMScheduler, ScoreSdeVeScheduler, UNet2DModel

    torch.manual_seed(0)
    folder = tmp_path / "model"
    channels = 4 if layout == "latent" else 3
    schedulers = {
        "variance-exploding": ScoreSdeVeScheduler(),
        "v-prediction": DDIMScheduler(prediction_type="v_prediction"),
    }
    extra = {"time_embedding_type": "fourier"} if layout == "variance-exploding" else {}
    UNet2DModel(**TINY | {"in_channels": channels, "out_channels": channels} | extra).save_pretrained(folder)
    if layout != "bare":
        schedulers.get(layout, DDPMScheduler()).save_pretrained(folder)
        name = type(schedulers.get(layout, DDPMScheduler())).__name__
        pipeline = "ScoreSdeVePipeline" if layout == "variance-exploding" else "DDPMPipeline"
        index = {
            "_class_name": pipeline,
            "scheduler": ["diffusers", name],
            "unet": ["diffusers", "UNet2DModel"],
        }
        (folder / "model_index.json").write_text(json.dumps(index))
    out = tmp_path / "out"
    result = gfprune_cli.prune(str(folder), sparsity=0.3, out=out, **QUICK)
    assert abs(result.sparsity["achieved"] - 0.3) <= 0.01
    assert (out / "config.json").exists() is (layout == "bare")
    assert (out / "unet" / "config.json").exists() is (layout != "bare")
    x = torch.randn(1, channels, 16, 16)
    assert bool(gfprune_cli.load(out)(x, 1).sample.isfinite().all())


def test_data_of_another_size_is_resized_and_said(pipeline_folder: Path, tmp_path: Path) -> None:
    from PIL import Image

    data = tmp_path / "images"
    data.mkdir()
    for index in range(4):
        Image.new("RGB", (20, 20), (index * 60, 0, 0)).save(data / f"{index}.png")
    notices: list[str] = []

    def listen(event: Event) -> None:
        if event.phase == "notice":
            notices.append(event.text)

    gfprune_cli.prune(str(pipeline_folder), data=str(data), out=tmp_path / "out", report=listen, **QUICK)
    assert any("resized" in text for text in notices)


def test_one_shot_and_coarse_score_less(pipeline_folder: Path, tmp_path: Path) -> None:
    costs = {}
    for mode, settings in (("full", {}), ("coarse", {"coarse": True}), ("one-shot", {"one_shot": True})):
        result = gfprune_cli.prune(
            str(pipeline_folder),
            out=tmp_path / mode,
            **QUICK | {"iterations": 8, "allocation": "scores"} | settings,
        )
        costs[mode] = result.scoring_gradients
    assert costs["full"] > costs["coarse"] > costs["one-shot"] == 1


@pytest.mark.parametrize(
    "criterion", ["gradient-flow", "gradient-flow-abs", "taylor", "diff-pruning", "magnitude", "random"]
)
def test_every_criterion_runs_and_they_choose_differently(
    pipeline_folder: Path, tmp_path: Path, criterion: str
) -> None:
    result = gfprune_cli.prune(str(pipeline_folder), criterion=criterion, out=tmp_path / "out", **QUICK)
    assert abs(result.sparsity["achieved"] - 0.5) <= 0.01
    other = "random" if criterion != "random" else "magnitude"
    gfprune_cli.prune(str(pipeline_folder), criterion=other, out=tmp_path / "other", **QUICK)
    kept = [json.loads((tmp_path / name / "gfprune.json").read_text())["kept"] for name in ("out", "other")]
    assert kept[0] != kept[1]


def test_low_precision_training_runs_on_the_cpu(pipeline_folder: Path, tmp_path: Path) -> None:
    result = gfprune_cli.prune(str(pipeline_folder), precision="bf16", out=tmp_path / "out", **QUICK)
    assert result.loss["removed"] is not None


def test_force_replaces_only_what_gfprune_wrote(pruned: Path, pipeline_folder: Path, tmp_path: Path) -> None:
    """Neither a folder of the user's, nor the model that is being pruned, nor a folder around it."""
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("keep me")
    with pytest.raises(UsageError, match="only what gfprune wrote"):
        gfprune_cli.prune(str(pipeline_folder), out=mine, force=True, **QUICK)
    assert (mine / "thesis.txt").read_text() == "keep me"
    copy = tmp_path / "around" / "model"
    shutil.copytree(pruned, copy)
    shutil.copy(copy / "gfprune.json", copy.parent)
    for out in (copy, copy.parent):
        with pytest.raises(UsageError, match="would replace --model"):
            gfprune_cli.prune(str(copy), sparsity=0.2, out=out, force=True, **QUICK)
    assert digest(copy) == digest(pruned)


def test_a_full_disk_is_said_and_changes_nothing(
    pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("gfprune_cli.checkpoint.durable.save_file", full)
    with pytest.raises(GfpruneError, match="no space left"):
        gfprune_cli.prune(str(pipeline_folder), out=tmp_path / "out", **QUICK)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.rglob("*.safetensors"))


def test_data_that_changed_is_noticed_on_resume(pipeline_folder: Path, tmp_path: Path) -> None:
    data, out = tmp_path / "data.npz", tmp_path / "out"
    np.savez(data, x=np.zeros((8, 16, 16, 3), np.uint8))

    def stop(event: Event) -> None:
        if event.phase == "train" and event.step == 2:
            raise Interrupted("stop", signal.SIGTERM)

    with pytest.raises(Interrupted, match="--resume"):
        gfprune_cli.prune(str(pipeline_folder), data=str(data), out=out, report=stop, **QUICK)
    np.savez(data, x=np.full((8, 16, 16, 3), 9, np.uint8))
    with pytest.raises(UsageError, match="data contents"):
        gfprune_cli.prune(str(pipeline_folder), data=str(data), out=out, resume=True, **QUICK)


def test_half_precision_in_half_precision_out(pipeline_folder: Path, tmp_path: Path) -> None:
    from diffusers import DDPMPipeline

    folder = tmp_path / "half"
    DDPMPipeline.from_pretrained(pipeline_folder, torch_dtype=torch.float16).save_pretrained(folder)
    result = gfprune_cli.prune(str(folder), out=tmp_path / "out", **QUICK)
    with safe_open(tmp_path / "out" / WEIGHTS, "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F16"}  # noqa: SIM118
    assert result.bytes["after"] < result.bytes["before"]
