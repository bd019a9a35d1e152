"""`prune` end to end on a tiny pipeline: what is written, loads elsewhere, repeats and resumes."""

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ONE_SHOT, QUICK, SMALLEST, Gfprune, quick_flags
from forked import Server
from safetensors import SafetensorError, safe_open

import gfprune_cli
from gfprune_cli.checkpoint.reader import inspect
from gfprune_cli.checkpoint.scheduler import load_scheduler
from gfprune_cli.checkpoint.source import resolve
from gfprune_cli.data.drawing import self_images
from gfprune_cli.data.sample_rows import MARGIN
from gfprune_cli.diffusion.schedulers import noising_process
from gfprune_cli.errors import GfpruneError, Interrupted, UsageError
from gfprune_cli.flow import loop
from gfprune_cli.progress import Event, silent
from gfprune_cli.pruning import flows
from gfprune_cli.recipes.prune import CRITERIA

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"

LOAD_ELSEWHERE = """
import sys
sys.modules["gfprune_cli"] = None  # an environment without gfprune
import torch
from diffusers import AutoModel, DDPMPipeline, DiffusionPipeline, UNet2DModel
out, saved, half, results, native, parameters = sys.argv[1:]
unet = DDPMPipeline.from_pretrained(native).unet
assert type(unet) is UNet2DModel
assert sum(p.numel() for p in unet.parameters()) == int(parameters)
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


def files(folder: Path) -> dict[str, bytes]:
    """Name -> content: weights, record, card and code; but for where it all lies."""
    return {
        str(path.relative_to(folder)): path.read_bytes().replace(str(folder).encode(), b"OUT")
        for path in folder.rglob("*")
        if path.is_file()
    }


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


def test_outputs_load_without_gfprune_and_survive_saving(
    pruned: Path, smallest_folder: Path, tmp_path: Path
) -> None:
    """Bit-identical through DiffusionPipeline, AutoModel, save_pretrained and an fp16 variant; native outputs
    in the stock class, without a flag."""
    native, results = tmp_path / "native", tmp_path / "results.pt"
    result = gfprune_cli.prune(
        str(smallest_folder), sparsity=0.4, layout="native", out=native, **QUICK | {"refit": False}
    )
    run_elsewhere(
        LOAD_ELSEWHERE, pruned, tmp_path / "saved", tmp_path / "half", results, native, result.params["after"]
    )
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    expected = gfprune_cli.load(pruned)(x, 7).sample
    for name, output in torch.load(results, weights_only=True).items():
        assert torch.equal(output, expected), name
    assert not list(native.rglob("*.py"))
    assert result.class_name == "UNet2DModel"


@pytest.mark.parametrize("layout", ["adaptive", "native"])
def test_keys_that_the_class_does_not_know_are_carried_along(
    smallest_folder: Path, tmp_path: Path, layout: str
) -> None:
    """Training scripts and other versions of diffusers write them; diffusers itself ignores them."""
    model = tmp_path / "model"
    shutil.copytree(smallest_folder, model)
    config = model / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"trained_with": "a script"}))
    settings = QUICK | dict(recover=0, refit=False)
    gfprune_cli.prune(str(model), sparsity=0.4, layout=layout, out=tmp_path / "out", **settings)
    assert json.loads((tmp_path / "out" / "unet" / "config.json").read_text())["trained_with"] == "a script"
    assert gfprune_cli.load(tmp_path / "out").config["trained_with"] == "a script"


def test_the_record_names_everything_needed_to_repeat_the_run(pruned: Path, pipeline_folder: Path) -> None:
    record = json.loads((pruned / "gfprune.json").read_text())
    assert record["recipe"]["sparsity"] == 0.5
    source = pipeline_folder / WEIGHTS
    assert record["source"]["weights"] == {source.name: hashlib.sha256(source.read_bytes()).hexdigest()}
    model = gfprune_cli.load(pruned)
    assert record["params"]["after"] == sum(parameter.numel() for parameter in model.parameters())
    assert record["bytes"]["after"] == (pruned / WEIGHTS).stat().st_size
    assert model.conv_in.out_channels == len(record["kept"]["conv_in"])
    loss, sparsity, refit = record["loss"], record["sparsity"], record["refit"]
    assert abs(loss["removed"] - loss["masked"]) <= 1e-4 * loss["masked"]
    assert loss.keys() == {"before", "masked", "removed", "recovered"}
    assert loss["recovered"] != loss["removed"]
    assert sparsity.keys() == {"target", "achieved", "of", "params", "macs"}
    for key in ("params", "macs"):
        assert sparsity[key] == 1 - record[key]["after"] / record[key]["before"]
    assert sparsity["achieved"] == min(sparsity["params"], sparsity["macs"]) >= sparsity["target"] == 0.5
    assert [entry["iteration"] for entry in refit["iterations"]] == [1, 2, 3], (
        "2 scorings, and one that closes"
    )
    assert all(entry["layers"] and entry["after"] < entry["before"] for entry in refit["iterations"])


def test_the_card_says_both_shares_and_the_loss_after_recovery(pruned: Path) -> None:
    record, card = json.loads((pruned / "gfprune.json").read_text()), (pruned / "README.md").read_text()
    shares = [f"{record['sparsity'][key]:.1%}" for key in ("params", "macs")]
    assert f"removed {shares[0]} of the parameters and {shares[1]} of the multiply-accumulates" in card
    assert f"| {record['loss']['before']:.4f} | {record['loss']['recovered']:.4f} |" in card


@pytest.mark.parametrize("recover", [0, 2])
def test_the_cards_picture_is_of_what_was_written(
    pipeline_folder: Path, tmp_path: Path, recover: int
) -> None:
    """Dense above pruned, the noise of the images that no training saw, the weights as a user loads them."""
    from PIL import Image

    out, settings = tmp_path / "out", ONE_SHOT | dict(recover=recover, refit=False)
    gfprune_cli.prune(str(pipeline_folder), sparsity=0.5, out=out, **settings)
    assert "](samples.png)" in (out / "README.md").read_text()
    page = np.asarray(Image.open(out / "samples.png"), dtype=int)
    process = noising_process(load_scheduler(inspect(resolve(str(pipeline_folder)))))
    for row, folder in enumerate((pipeline_folder, out)):
        images = self_images(
            gfprune_cli.load(folder), process, count=8, steps=settings["sample_steps"], seed=0,
            conditions=None, shape=(3, 16, 16), device=torch.device("cpu"), progress=silent,
        )  # fmt: skip
        levels = ((images[6:] + 1) * 127.5).clamp(0, 255)  # a quarter of the eight is kept aside
        for number, expected in enumerate(levels):
            left, top = MARGIN + number * 64, row * 64
            shown = page[top : top + 64 : 4, left : left + 64 : 4].transpose(2, 0, 1)
            assert np.abs(shown - expected.numpy()).max() < 1
    assert page.shape == (128, MARGIN + 2 * 64, 3)


def test_no_pickle_and_ordinary_modes(pruned: Path) -> None:
    suffixes = {path.suffix for path in pruned.rglob("*") if path.is_file()}
    assert suffixes == {".json", ".md", ".png", ".py", ".safetensors"}
    mask = os.umask(0)
    os.umask(mask)
    assert {path.stat().st_mode & 0o777 for path in pruned.rglob("*") if path.is_file()} == {0o666 & ~mask}


def test_the_written_recipe_reproduces_the_output(pruned: Path, tmp_path: Path, gfprune: Gfprune) -> None:
    recipe = json.loads((pruned / "gfprune.json").read_text())["recipe"]
    config = tmp_path / "recipe.yaml"
    config.write_text(json.dumps(recipe))
    done = gfprune("prune", "--config", config, "--out", tmp_path / "again")
    assert done.returncode == 0, done.stderr
    assert digest(tmp_path / "again") == digest(pruned)


EVENTS = [
    ("score", 4),
    *[(phase, step) for step in (1, 2, 3) for phase in ("mask", "refit", "refitted")],
    *[("remove", 0), ("pass", 0), ("finetune", 1), ("finetune", 2), ("write", 0)],
]  # phase and step, in the order of a `QUICK` run


@pytest.mark.parametrize(
    ("layout", "stops"),
    [("adaptive", EVENTS), pytest.param("native", EVENTS[5:13:3], marks=pytest.mark.thorough)],
)
def test_a_run_stopped_at_every_event_resumes_to_the_same_bytes(
    pruned: Path,
    pipeline_folder: Path,
    tmp_path: Path,
    layout: str,
    stops: list[tuple[str, int]],
    thorough: bool,
) -> None:
    """Weights, record and card: each run goes on from what the one before it saved; at every other event
    without --thorough."""
    settings: dict[str, Any] = dict(sparsity=0.5, layout=layout, out=tmp_path / "out", **QUICK)
    whole, left = pruned, list(stops if thorough else stops[::2])
    if layout == "native":
        whole = tmp_path / "whole" / "out"
        gfprune_cli.prune(str(pipeline_folder), **settings | {"out": whole})

    def stopper() -> Callable[[Event], None]:
        seen = Counter[tuple[str, int]]()

        def stop(event: Event) -> None:
            here = (event.phase, event.step)
            seen[here] += 1
            within = event.phase != "refit" or seen[here] == 20  # with some of its layers fitted
            if within and left and here == left[0]:
                left.pop(0)
                raise Interrupted("stop", signal.SIGTERM)

        return stop

    for run in itertools.count():
        with contextlib.suppress(Interrupted):
            gfprune_cli.prune(str(pipeline_folder), resume=run > 0, progress=stopper(), **settings)
            break
        if run == 2:
            with pytest.raises(UsageError, match="--resume"):
                gfprune_cli.prune(str(pipeline_folder), **settings)
            with pytest.raises(UsageError, match="other sparsity"):
                gfprune_cli.prune(str(pipeline_folder), resume=True, **settings | {"sparsity": 0.4})
    assert left == []
    assert files(tmp_path / "out") == files(whole)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.thorough  # reliability/ has signals in every phase, and SIGKILL at random moments
@pytest.mark.parametrize(
    ("number", "phase", "nth"), [(signal.SIGKILL, "finetune", 0), (signal.SIGTERM, "refit", 30)]
)
def test_a_killed_process_resumes_to_the_same_bytes(
    pruned: Path, pipeline_folder: Path, tmp_path: Path, server: Server, number: int, phase: str, nth: int
) -> None:
    out = tmp_path / "out"
    command = ["prune", "--model", pipeline_folder, "--sparsity", 0.5, "--out", out, *quick_flags()]
    killed = server.run(*command, phase=phase, nth=nth, signals=[number])
    assert killed.code == (143 if number == signal.SIGTERM else -signal.SIGKILL)
    assert not out.exists()
    done = server.run(*command, "--resume")
    assert done.code == 0, done.stderr
    assert digest(out) == digest(pruned)


def test_resuming_a_finished_run_says_the_same_again(smallest_folder: Path, tmp_path: Path) -> None:
    """A job that is killed after the output appeared, and repeated, succeeds; only on its own output."""
    data, out = tmp_path / "data.npz", tmp_path / "out"
    np.savez(data, x=np.zeros((8, 8, 8, 3), np.uint8))
    settings: dict[str, Any] = dict(data=str(data), out=out, one_shot=True, draws=8, images=8, recover=1)
    first = gfprune_cli.prune(str(smallest_folder), sparsity=0.5, **settings)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    phases = []
    again = gfprune_cli.prune(
        str(smallest_folder),
        sparsity=0.5,
        resume=True,
        progress=lambda event: phases.append(event.phase),
        **settings,
    )
    times: dict[str, Any] = dict(seconds=0, seconds_by_phase={})
    assert replace(again, **times) == replace(first, **times)
    assert not {"score", "refit", "remove", "finetune", "write"} & set(phases)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    with pytest.raises(UsageError, match="another run"):
        gfprune_cli.prune(str(smallest_folder), sparsity=0.4, resume=True, **settings)
    np.savez(data, x=np.full((8, 8, 8, 3), 9, np.uint8))
    with pytest.raises(UsageError, match="another run"):
        gfprune_cli.prune(str(smallest_folder), sparsity=0.5, resume=True, **settings)


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
    config = SMALLEST | {"in_channels": channels, "out_channels": channels} | extra
    UNet2DModel(**config).save_pretrained(folder)
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
    result = gfprune_cli.prune(str(folder), sparsity=0.3, out=out, **ONE_SHOT)
    assert abs(result.sparsity["achieved"] - 0.3) <= 0.01
    assert (out / "config.json").exists() is (layout == "bare")
    assert (out / "unet" / "config.json").exists() is (layout != "bare")
    assert (out / "samples.png").exists() is (layout != "latent")
    x = torch.randn(1, channels, 8, 8)
    assert bool(gfprune_cli.load(out)(x, 1).sample.isfinite().all())


def test_data_of_another_size_is_resized_and_said(smallest_folder: Path, tmp_path: Path) -> None:
    from PIL import Image

    data = tmp_path / "images"
    data.mkdir()
    for index in range(4):
        Image.new("RGB", (20, 20), (index * 60, 0, 0)).save(data / f"{index}.png")
    notices: list[str] = []

    def listen(event: Event) -> None:
        if event.phase == "notice":
            notices.append(event.text)

    gfprune_cli.prune(str(smallest_folder), data=str(data), out=tmp_path / "out", progress=listen, **ONE_SHOT)
    assert any("resized" in text for text in notices)
    assert (tmp_path / "out" / "samples.png").exists()


def test_a_refit_mends_what_one_shot_removal_breaks(pipeline_folder: Path, tmp_path: Path) -> None:
    """On images that neither saw; what it costs is counted in gradients of single samples."""
    settings = ONE_SHOT | {"recover": 0}
    results = {
        refit: gfprune_cli.prune(str(pipeline_folder), out=tmp_path / f"{refit}", refit=refit, **settings)
        for refit in (False, True)
    }
    plain, mended = (results[refit].loss["removed"] for refit in (False, True))
    assert plain is not None
    assert mended is not None
    assert mended < plain - 0.01
    assert results[False].refit == {"draws": flows.JUDGE_DRAWS, "iterations": []}
    scored = QUICK["draws"] + 4 / 3 * loop.COMPARED_SAMPLES
    assert results[False].scoring_gradients == pytest.approx(scored, abs=0.01)
    passes = 2 * loop.REFIT_SAMPLES + 3 * flows.JUDGE_DRAWS  # both networks; before, after, and the dense one
    assert results[True].scoring_gradients == pytest.approx(scored + passes / 3, abs=0.01)


def test_without_refit_and_recovery_the_weights_that_stay_are_the_dense_ones(
    pruned: Path, pipeline_folder: Path, tmp_path: Path
) -> None:
    """Bit for bit: every number of a tensor is one of the dense tensor; fitted ones are not."""
    dense = dict(gfprune_cli.load(pipeline_folder).named_parameters())
    plain = gfprune_cli.prune(
        str(pipeline_folder), out=tmp_path / "plain", **QUICK | {"refit": False, "recover": 0}
    )
    assert plain.loss["recovered"] is None
    for folder, same in ((tmp_path / "plain", True), (pruned, False)):
        found = {
            name: bool(torch.isin(tensor, dense[name]).all())
            for name, tensor in gfprune_cli.load(folder).named_parameters()
        }
        assert len(found) == len(dense)
        assert all(found.values()) is same


def test_every_criterion_runs_and_they_choose_differently(smallest_folder: Path, tmp_path: Path) -> None:
    chosen = {}
    for criterion in CRITERIA:
        result = gfprune_cli.prune(
            str(smallest_folder), criterion=criterion, out=tmp_path / criterion,
            **ONE_SHOT | {"refit": False, "recover": 0},
        )  # fmt: skip
        assert abs(result.sparsity["achieved"] - 0.5) <= 0.01
        chosen[criterion] = json.loads((tmp_path / criterion / "gfprune.json").read_text())["kept"]
    # as few draws are one chunk, of which diff-pruning leaves nothing out
    assert chosen.pop("diff-pruning") == chosen["taylor"]
    assert not any(one == other for one, other in itertools.combinations(chosen.values(), 2))


def test_low_precision_recovery_runs_on_the_cpu(pruned: Path, pipeline_folder: Path, tmp_path: Path) -> None:
    """What came before it is the same."""
    result = gfprune_cli.prune(str(pipeline_folder), precision="bf16", out=tmp_path / "out", **QUICK)
    loss = json.loads((pruned / "gfprune.json").read_text())["loss"]
    assert {key for key in loss if result.loss[key] == loss[key]} == {"before", "masked", "removed"}
    assert digest(tmp_path / "out") != digest(pruned)


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
    smallest_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("gfprune_cli.outputs.durable.save_file", full)
    with pytest.raises(GfpruneError, match="no space left"):
        gfprune_cli.prune(str(smallest_folder), out=tmp_path / "out", **QUICK)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.rglob("*.safetensors"))


def test_data_that_changed_is_noticed_on_resume(smallest_folder: Path, tmp_path: Path) -> None:
    data, out = tmp_path / "data.npz", tmp_path / "out"
    np.savez(data, x=np.zeros((8, 8, 8, 3), np.uint8))

    def stop(event: Event) -> None:
        if event.phase == "refitted":
            raise Interrupted("stop", signal.SIGTERM)

    with pytest.raises(Interrupted, match="--resume"):
        gfprune_cli.prune(str(smallest_folder), data=str(data), out=out, progress=stop, **QUICK)
    np.savez(data, x=np.full((8, 8, 8, 3), 9, np.uint8))
    with pytest.raises(UsageError, match="data contents"):
        gfprune_cli.prune(str(smallest_folder), data=str(data), out=out, resume=True, **QUICK)


def test_half_precision_in_half_precision_out(smallest_folder: Path, tmp_path: Path) -> None:
    from diffusers import DDPMPipeline

    folder = tmp_path / "half"
    DDPMPipeline.from_pretrained(smallest_folder, torch_dtype=torch.float16).save_pretrained(folder)
    result = gfprune_cli.prune(str(folder), out=tmp_path / "out", **ONE_SHOT)
    with safe_open(tmp_path / "out" / WEIGHTS, "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F16"}  # noqa: SIM118
    assert result.bytes["after"] < result.bytes["before"]
