"""`eval` end to end on a tiny pipeline: what it prints, writes, repeats, resumes and refuses."""

import base64
import errno
import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ONE_SHOT, Gfprune, Shell, examples
from PIL import Image

import gfprune_cli
from gfprune_cli.errors import GfpruneError, Interrupted, UsageError
from gfprune_cli.evaluation.command import evaluate as run_evaluation
from gfprune_cli.evaluation.result import EvalResult
from gfprune_cli.outputs.durable import write_tensors
from gfprune_cli.outputs.locks import exclusive
from gfprune_cli.progress import Event
from gfprune_cli.recipes.evaluate import EvalRecipe
from gfprune_cli.recipes.run_options import RunOptions

KEYS = {
    "schema_version", "command", "model", "reference", "component", "class_name", "samples", "metrics",
    "loss_by_timestep", "latency", "params", "macs", "bytes", "memory", "gates", "warnings", "fold", "device",
    "tools", "recipe", "seconds",
}  # fmt: skip
FAST: dict[str, Any] = dict(samples=6, steps=3, batch=4, no_latency=True)
FLAGS = ["--samples", "6", "--steps", "3", "--batch", "4", "--no-latency"]


@pytest.fixture(scope="module")
def pruned(pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pipeline, half of its parameters gone; its record names the dense one."""
    out = tmp_path_factory.mktemp("pruned") / "out"
    gfprune_cli.prune(str(pipeline_folder), sparsity=0.5, out=out, **ONE_SHOT)
    return out


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten coloured pictures in the network's size."""
    folder = tmp_path_factory.mktemp("images")
    pixels = np.random.default_rng(0).integers(0, 256, (10, 4, 4, 3)).repeat(4, 1).repeat(4, 2)
    for number, image in enumerate(pixels.astype(np.uint8)):
        Image.fromarray(image).save(folder / f"{number}.png")
    return folder


class Regions(torch.nn.Module):
    """A stand-in for Inception: the colours of four regions."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(x / 255, (2, 2)).flatten(1)


@pytest.fixture(scope="module")
def extractor(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Settings that name a TorchScript network."""
    pytest.importorskip("cleanfid.resize")
    path = tmp_path_factory.mktemp("network") / "regions.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(Regions()).save(path)
    return dict(inception=str(path), inception_sha256=hashlib.sha256(path.read_bytes()).hexdigest())


def evaluate(model: Path, **settings: Any) -> EvalResult:
    result = gfprune_cli.evaluate(str(model), **(FAST | settings))
    assert result is not None
    return result


def numbers(result: EvalResult) -> Any:
    """What must not depend on how a run went."""
    return result.document()["metrics"], result.document()["loss_by_timestep"], result.grid


def test_json_is_one_document_with_every_promised_key(pruned: Path, pipeline_folder: Path) -> None:
    result = evaluate(pruned, no_latency=False, latency_batches="1,2")
    document = json.loads(json.dumps(result.document(), allow_nan=False))
    assert document.keys() == KEYS
    assert (document["schema_version"], document["command"]) == (1, "eval")
    assert document["reference"] == str(pipeline_folder)
    assert set(document["metrics"]) == {
        "ssim", "psnr", "ssim_8bit", "psnr_8bit", "fd_teacher", "loss", "loss_reference",
    }  # fmt: skip
    assert document["params"]["model"] < document["params"]["reference"]
    assert document["macs"]["model"] < document["macs"]["reference"]
    weights = pruned / "unet/diffusion_pytorch_model.safetensors"
    assert document["bytes"]["model"] == weights.stat().st_size
    assert [row["batch"] for row in document["latency"]] == [1, 2]
    ratio = document["macs"]["reference"] / document["macs"]["model"]
    assert document["latency"][0]["mac_ratio"] == pytest.approx(ratio)
    assert document["samples"]["timestep_spacing"] == "trailing"


def test_a_model_agrees_with_itself_exactly(pipeline_folder: Path) -> None:
    result = evaluate(pipeline_folder, reference=str(pipeline_folder), eta=0.7)
    assert result.metrics["ssim"]["value"] == 1.0
    assert result.metrics["ssim_8bit"]["value"] == 1.0
    assert result.metrics["psnr"] == {"value": None, "ci95": None, "n": 6, "identical": 6}
    assert result.metrics["fd_teacher"]["value"] == pytest.approx(0, abs=1e-6)
    assert result.metrics["loss"] == result.metrics["loss_reference"]
    assert all(one == other for one, other in result.grid)


@pytest.mark.matrix(2)
@pytest.mark.parametrize(
    "settings", [{}, {"eta": 1.0, "timestep_spacing": "quad"}, {"sampler": "ddpm"}, {"sampler": "pipeline"}]
)
def test_the_batch_size_does_not_matter(pruned: Path, settings: Any) -> None:
    """Up to rounding: kernels add up in another order."""
    one, other = (evaluate(pruned, batch=batch, **settings).metrics for batch in (6, 1))
    assert one.keys() == other.keys()
    for name, metric in one.items():
        assert metric["value"] == pytest.approx(other[name]["value"], rel=1e-3, abs=1e-4), name


def test_same_seed_same_numbers_and_another_seed_differs(pruned: Path) -> None:
    first = evaluate(pruned)
    assert numbers(evaluate(pruned)) == numbers(first)
    assert numbers(evaluate(pruned, seed=1)) != numbers(first)


def stop_after(count: int) -> Callable[[Event], None]:
    """A callback that interrupts the run at its `count`th sampling event."""
    seen = 0

    def progress(event: Event) -> None:
        nonlocal seen
        seen += event.phase == "sample"
        if seen == count:
            raise Interrupted("stopped by SIGTERM", int(signal.SIGTERM))

    return progress


def test_an_interrupted_run_continues_to_the_same_numbers(pruned: Path, tmp_path: Path) -> None:
    whole = evaluate(pruned, eta=0.5)
    out = tmp_path / "out"
    with pytest.raises(Interrupted):
        evaluate(pruned, eta=0.5, out=out, progress=stop_after(7))
    state = tmp_path / ".out.gfprune-state"
    assert len(list(state.glob("reference-*.safetensors"))) == 1
    with pytest.raises(UsageError, match="--resume"):
        evaluate(pruned, eta=0.5, out=out)
    with pytest.raises(UsageError, match="other eta"):
        evaluate(pruned, out=out, resume=True)
    drawn: list[Event] = []
    resumed = evaluate(pruned, eta=0.5, out=out, resume=True, progress=drawn.append)
    assert numbers(resumed) == numbers(whole)
    assert sum(event.phase == "sample" for event in drawn) == 3 * 3 + 4  # three chunks drawn, four counted
    assert not state.exists()


def test_without_an_output_the_state_lies_in_the_cache(
    pruned: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setenv("GFPRUNE_CACHE", str(tmp_path))
    with pytest.raises(Interrupted):
        evaluate(pruned, progress=stop_after(7))
    assert len(list((tmp_path / "eval").glob("*/reference-*.safetensors"))) == 1
    evaluate(pruned, resume=True)
    assert list((tmp_path / "eval").iterdir()) == []


def test_two_processes_give_what_one_gives(pruned: Path, tmp_path: Path, all_draws: None) -> None:
    """Launched as `accelerate launch` does it; the first process alone prints."""
    command = ["-m", "gfprune_cli", "eval", "--model", str(pruned), "--json", "--eta", "0.5", *FLAGS]
    launched = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2",
         "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port",
         "0", *command],
        capture_output=True, text=True, timeout=300, env=os.environ, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert launched.returncode == 0, launched.stderr
    document = json.loads(launched.stdout)
    alone = evaluate(pruned, eta=0.5).document()
    assert document["metrics"] == alone["metrics"]
    assert document["loss_by_timestep"] == alone["loss_by_timestep"]
    assert launched.stderr.count("no FID and KID") == 1


def test_stdout_is_markdown_and_files_are_written(pruned: Path, tmp_path: Path, gfprune: Gfprune) -> None:
    done = gfprune(
        "eval", "--model", pruned, "--html", "a.html", "--markdown", "a.md", "--out", "pictures", *FLAGS,
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == (tmp_path / "a.md").read_text()
    assert "SSIM" in done.stdout
    assert "\x1b" not in done.stderr
    names = sorted(path.name for path in (tmp_path / "pictures/model").iterdir())
    assert names == [f"{number:06d}.png" for number in range(6)]
    picture = (tmp_path / "pictures/reference/000000.png").read_bytes()
    assert base64.b64encode(picture).decode() in (tmp_path / "a.html").read_text()
    record = json.loads((tmp_path / "pictures/gfprune.json").read_text())
    assert record["recipe"]["samples"] == 6
    assert not list(tmp_path.glob(".*"))
    again = gfprune("eval", "--model", pruned, "--html", "a.html", *FLAGS, cwd=tmp_path)
    assert again.returncode == 2
    assert "--force" in again.stderr


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("flag", ["--model", "--reference", "--data", None])
def test_force_replaces_no_input_and_no_checkpoint_by_samples(
    pruned: Path, image_folder: Path, tmp_path: Path, flag: str | None
) -> None:
    """A folder that holds an input is an input, too: all of it would go."""
    outer = tmp_path / "outer"
    folder = outer / "inner"
    shutil.copytree(image_folder if flag == "--data" else pruned, folder)
    named = {} if flag is None else {flag.removeprefix("--"): str(folder)}
    recipe = EvalRecipe(**({"model": str(pruned)} | FAST | named))
    if flag == "--data":
        (folder / "gfprune.json").write_text('{"command": "eval"}')
    (outer / "gfprune.json").write_text('{"command": "eval"}')
    before = contents(outer)
    says = f"would replace {flag}|an output to keep" if flag else "an output to keep"
    for out in (folder, outer) if flag else (folder,):
        with pytest.raises(UsageError, match=says) as error:
            run_evaluation(recipe, RunOptions(out=out, force=True))
        assert "--out" in str(error.value)
        assert contents(outer) == before


@pytest.mark.parametrize("flag", ["--html", "--markdown", "--save-stats"])
def test_force_replaces_a_page_by_a_page_only(
    pruned: Path, image_folder: Path, tmp_path: Path, gfprune: Gfprune, flag: str
) -> None:
    weights = shutil.copytree(pruned, tmp_path / "copy") / "unet" / "diffusion_pytorch_model.safetensors"
    before = weights.read_bytes()
    done = gfprune("eval", "--model", pruned, "--data", image_folder, flag, weights, "--force", *FLAGS)
    assert done.returncode == 2
    assert f"{flag} {weights} is a file of another kind" in done.stderr
    assert weights.read_bytes() == before


def test_force_replaces_no_data_by_its_statistics(pruned: Path, tmp_path: Path, gfprune: Gfprune) -> None:
    """Both are .npz files; the images are the user's own."""
    data = tmp_path / "images.npz"
    np.savez(data, x=np.zeros((4, 8, 8, 3), np.uint8))
    before = data.read_bytes()
    done = gfprune("eval", "--model", pruned, "--data", data, "--save-stats", data, "--force", *FLAGS)
    assert done.returncode == 2
    assert "of another kind" in done.stderr
    assert data.read_bytes() == before


def test_pages_are_known_again(pruned: Path, tmp_path: Path, gfprune: Gfprune) -> None:
    """What the command wrote, or an empty file that was made for it, is replaced."""
    (tmp_path / "a.html").touch()
    pages = ["--html", tmp_path / "a.html", "--markdown", tmp_path / "a.md", "--force"]
    for _ in range(2):
        assert gfprune("eval", "--model", pruned, *pages, *FLAGS).returncode == 0
    assert (tmp_path / "a.html").stat().st_size > 1000


def test_a_reference_that_is_not_there_is_named_by_its_flag(pruned: Path) -> None:
    with pytest.raises(UsageError, match="--reference 'nothere'"):
        run_evaluation(EvalRecipe(model=str(pruned), reference="nothere", **FAST), RunOptions(offline=True))


def test_a_missed_gate_exits_with_3_and_still_prints(pruned: Path, gfprune: Gfprune) -> None:
    done = gfprune(
        "eval", "--model", pruned, "--json", "--quiet", "--max-loss", "1e-9", "--min-ssim", "-1", *FLAGS
    )
    assert done.returncode == 3, done.stderr
    gates = {gate["name"]: gate for gate in json.loads(done.stdout)["gates"]}
    assert gates["min-ssim"]["passed"]
    assert not gates["max-loss"]["passed"]
    assert gates["max-loss"]["value"] > gates["max-loss"]["limit"]
    assert len(done.stderr.strip().splitlines()) == 1
    assert "--max-loss" in done.stderr
    assert "--min-ssim" not in done.stderr


def test_gates_that_hold_exit_with_0(pruned: Path) -> None:
    result = evaluate(
        pruned, no_latency=False, latency_batches="1", min_speedup=1e-6, max_loss=1e9, min_ssim=-1.0
    )
    assert [gate.name for gate in result.gates] == ["min-ssim", "min-speedup", "max-loss"]
    assert result.missed == []


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_fid": 10.0}, "--max-fid.*--data names no real images"),
        ({"max_fid": 10.0, "data": "IMAGES"}, "--max-fid.*--inception"),
        ({"min_speedup": 1.0}, "--min-speedup.*--no-latency"),
        ({"model": "DENSE", "min_ssim": 0.5}, "--min-ssim.*gfprune.json"),
        ({"reference_revision": "main"}, "needs --reference"),
        ({"latency_batches": "1,x"}, "--latency-batches"),
        ({"inception": "x.pt"}, "--inception is for FID"),
        ({"save_stats": "x.npz"}, "--save-stats needs"),
        ({"reference": "demo"}, "cannot be compared"),
        ({"samples": 1}, "--samples|samples"),
    ],
)
def test_what_cannot_be_answered_is_refused_before_the_work(
    pruned: Path, pipeline_folder: Path, image_folder: Path, settings: Any, words: str
) -> None:
    drawn: list[Event] = []
    named = {"IMAGES": str(image_folder), "DENSE": str(pipeline_folder)}
    settings = {key: named.get(value, value) for key, value in settings.items()}
    model = Path(settings.pop("model", pruned))
    with pytest.raises(UsageError, match=words):
        evaluate(model, progress=drawn.append, **settings)
    assert not any(event.phase == "sample" for event in drawn)


def test_a_dense_model_has_no_reference_unless_one_is_named(pipeline_folder: Path) -> None:
    result = evaluate(pipeline_folder)
    assert result.reference is None
    assert set(result.metrics) == {"loss"}
    assert result.params["reference"] is None
    assert any("no reference" in text for text in result.warnings)
    assert [one for one, _ in result.grid] == [b""] * 6


def test_a_reference_that_has_changed_is_not_taken(
    pruned: Path, pipeline_folder: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(pruned, model)
    record = json.loads((model / "gfprune.json").read_text())
    record["source"]["weights"] = dict.fromkeys(record["source"]["weights"], "0" * 64)
    (model / "gfprune.json").write_text(json.dumps(record))
    result = evaluate(model)
    assert result.reference is None
    assert any("are not those" in text for text in result.warnings)
    named = evaluate(model, reference=str(pipeline_folder))
    assert named.reference == str(pipeline_folder)


def test_a_failing_disk_does_not_pass_for_a_missing_reference(
    pruned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The numbers would be others, though the command says that all went well."""

    def failing(root: Path, _component: str) -> Any:
        try:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        except OSError as error:
            raise GfpruneError(f"{root} cannot be read: {error}") from None

    monkeypatch.setattr("gfprune_cli.evaluation.subjects.read_record", failing)
    with pytest.raises(GfpruneError, match="cannot be read"):
        evaluate(pruned)


def test_another_extractor_is_never_called_fid(
    pruned: Path, image_folder: Path, extractor: dict[str, str], tmp_path: Path
) -> None:
    stats = tmp_path / "stats.npz"
    result = evaluate(pruned, data=str(image_folder), save_stats=stats, **extractor)
    assert {"fd_regions", "kd_regions", "fd_regions_reference"} <= set(result.metrics)
    assert not {"fid", "kid"} & set(result.metrics)
    assert result.metrics["fd_regions"]["n_real"] == 10
    assert any("fd_regions comes from 6 images in 12 dimensions" in text for text in result.warnings)
    assert result.metrics["fd_teacher"]["against"] == "data"
    with np.load(stats, allow_pickle=False) as saved:
        assert int(saved["n"]) == 10
        assert str(saved["mode"]) == "clean"
    again = evaluate(pruned, data=str(stats), **extractor)
    assert again.metrics["fd_regions"]["value"] == pytest.approx(result.metrics["fd_regions"]["value"])
    assert "kd_regions" not in again.metrics
    with pytest.raises(UsageError, match="not Inception"):
        evaluate(pruned, data=str(image_folder), max_fid=100.0, **extractor)


def test_offline_and_without_weights_the_rest_is_measured(pruned: Path, image_folder: Path) -> None:
    result = evaluate(pruned, data=str(image_folder), offline=True)
    assert "fid" not in result.metrics
    assert math.isfinite(result.metrics["fd_teacher_reference"]["value"])
    assert any(text.startswith("no FID and KID") and "--inception" in text for text in result.warnings)


def test_an_npz_of_images_is_data(pruned: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, x=np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3)).astype(np.uint8))
    assert evaluate(pruned, data=str(path)).metrics["fd_teacher"]["n_real"] == 6


@pytest.mark.slow
def test_the_gate_of_the_documentation_runs_as_written(pruned: Path, tmp_path: Path, shell: Shell) -> None:
    page = Path(__file__).parents[2] / "docs/evaluation.md"
    script = next(block for block in examples(page, "sh") if "--min-ssim" in block)
    found = shell(["bash", "-c", 'OUT=$0 bash -euc "$1" || echo $?', str(pruned), script])
    assert found == "not good enough\n1\n"  # a random network denoises nothing
    gates = json.loads((tmp_path / "eval.json").read_text())["gates"]
    assert {gate["name"] for gate in gates} == {"min-ssim", "max-loss"}


@pytest.mark.parametrize("sampler", ["euler", "pipeline"])
def test_variance_exploding_pipelines(sampler: str, tmp_path: Path) -> None:
    from diffusers import ScoreSdeVePipeline, ScoreSdeVeScheduler
    from networks import build

    folder = tmp_path / "ncsnpp"
    ScoreSdeVePipeline(build("ncsnpp", sample_size=16), ScoreSdeVeScheduler()).save_pretrained(folder)
    result = evaluate(folder, reference=str(folder), sampler=sampler, samples=3, batch=2)
    assert result.metrics["ssim"]["value"] == 1.0
    assert result.samples["sampler"] == sampler


def test_class_conditional_networks_draw_labels(tmp_path: Path) -> None:
    from diffusers import DDPMPipeline, DDPMScheduler
    from networks import build

    folder = tmp_path / "classes"
    DDPMPipeline(build("resnet-classes", sample_size=16), DDPMScheduler()).save_pretrained(folder)
    one, other = (evaluate(folder, reference=str(folder), batch=batch).grid for batch in (6, 4))
    difference = [
        np.abs(pixels(first[1]).astype(int) - pixels(second[1]).astype(int)).max()
        for first, second in zip(one, other, strict=True)
    ]
    assert max(difference) <= 2


def pixels(png: bytes) -> np.ndarray:
    import io

    return np.asarray(Image.open(io.BytesIO(png)))


def test_latent_pipelines_are_compared_in_latents(pipeline_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "latent"
    shutil.copytree(pipeline_folder, folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"vqvae": ["diffusers", "VQModel"]}))
    result = evaluate(folder, reference=str(folder))
    assert result.metrics["ssim"]["value"] == 1.0
    assert "ssim_8bit" not in result.metrics
    assert list(result.grid) == []
    assert any("latents" in text for text in result.warnings)
    with pytest.raises(UsageError, match="--out"):
        evaluate(folder, out=tmp_path / "pictures")


def test_samples_that_are_not_finite_stop_the_run(pipeline_folder: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(
        "gfprune_cli.evaluation.job.call", lambda network, x, timesteps, labels: x * float("nan")
    )
    with pytest.raises(GfpruneError, match="not finite"):
        evaluate(pipeline_folder, seed=77)


def test_samples_without_an_identity_are_never_used(
    pruned: Path, pipeline_folder: Path, tmp_path: Path
) -> None:
    """What a kill in the middle of a clean-up could leave: zeros, which would pass for samples."""
    page = tmp_path / "a.html"
    clean = evaluate(pruned, no_latency=True)
    state = tmp_path / ".a.html.gfprune-state"
    state.mkdir()
    write_tensors(state / "model-000000.safetensors", {"images": torch.zeros(4, 3, 16, 16)})
    again = run_evaluation(EvalRecipe(model=str(pruned), **FAST), RunOptions(html=page, resume=True))
    assert again is not None
    assert again.metrics["ssim"] == clean.metrics["ssim"]
    assert not state.exists()


def test_two_runs_into_one_place_do_not_mix(pruned: Path, tmp_path: Path) -> None:
    page = tmp_path / "a.html"
    recipe = EvalRecipe(model=str(pruned), **FAST)
    with (
        exclusive(tmp_path / ".a.html.gfprune-state"),
        pytest.raises(UsageError, match="another run is working"),
    ):
        run_evaluation(recipe, RunOptions(html=page, resume=True))
    assert run_evaluation(recipe, RunOptions(html=page)) is not None
    assert list(tmp_path.iterdir()) == [], "neither state nor lock is left"


def test_samples_survive_a_report_that_cannot_be_written(pruned: Path, tmp_path: Path) -> None:
    def fail(result: EvalResult) -> None:
        raise GfpruneError("no space")

    recipe, page = EvalRecipe(model=str(pruned), **FAST), tmp_path / "a.html"
    with pytest.raises(GfpruneError, match="no space"):
        run_evaluation(recipe, RunOptions(html=page), publish=fail)
    drawn = []
    run_evaluation(recipe, RunOptions(html=page, resume=True), lambda event: drawn.append(event.phase))
    assert drawn.count("sample") <= 4, "one event for each chunk that is there, none for a pass"


def test_lack_of_memory_draws_a_chunk_in_parts(pruned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gfprune_cli.evaluation import job as run

    whole = evaluate(pruned, no_latency=True)
    draw = run.draw

    def cramped(*arguments: Any, members: range, **options: Any) -> torch.Tensor:
        if len(members) > 1:
            raise torch.OutOfMemoryError("no")
        return draw(*arguments, members=members, **options)

    monkeypatch.setattr(run, "draw", cramped)
    parts = evaluate(pruned, no_latency=True)
    assert parts.metrics["ssim"]["value"] == pytest.approx(whole.metrics["ssim"]["value"], abs=1e-4)


def test_one_file_cannot_hold_two_reports(pruned: Path, tmp_path: Path, gfprune: Gfprune) -> None:
    path = tmp_path / "report"
    done = gfprune("eval", "--model", pruned, "--html", path, "--markdown", path)
    assert done.returncode == 2
    assert "name the same file" in done.stderr
    long = tmp_path / ("x" * 230)
    done = gfprune("eval", "--model", pruned, "--markdown", long)
    assert done.returncode == 2
    assert "shorter" in done.stderr
