"""`finetune` end to end on a tiny pruned pipeline: what is written, repeats, resumes, and is refused."""

import contextlib
import dataclasses
import hashlib
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ONE_SHOT, TINY, Gfprune
from diffusers import DDPMWuerstchenScheduler
from forked import Server
from PIL import Image
from torch import nn

import gfprune_cli
from gfprune_cli.errors import GfpruneError, Interrupted, UsageError
from gfprune_cli.progress import Event
from gfprune_cli.recipes.finetune import SOAP_RATE
from gfprune_cli.recovery import job
from gfprune_cli.recovery.job import FinetuneJob

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
# AdamW: two processes end where one does to float tolerance, and Muon orthogonalises in bfloat16
BRIEF: dict[str, Any] = dict(steps=6, batch=4, images=12, sample_steps=2, optimizer="adamw")
Finetune = dict[str, Any]


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()


def flags(**settings: Any) -> list[str]:
    return [part for name, value in settings.items() for part in ("--" + name.replace("_", "-"), str(value))]


@pytest.fixture(scope="module")
def pruned(pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pruned") / "out"
    gfprune_cli.prune(str(pipeline_folder), sparsity=0.5, out=out, **ONE_SHOT)
    return out


@pytest.fixture(scope="module")
def tuned(pruned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tuned") / "out"
    gfprune_cli.finetune(pruned, out=out, save_every=2, sample_every=3, **BRIEF)
    return out


def test_output_is_a_checkpoint_like_prunes_with_record_and_card_extended(
    pruned: Path, tuned: Path, pipeline_folder: Path
) -> None:
    before, after = (json.loads((folder / "gfprune.json").read_text()) for folder in (pruned, tuned))
    entry = after["finetune"][0]
    assert {key: value for key, value in after.items() if key != "finetune"} == before
    assert entry["recipe"]["steps"] == 6
    assert entry["teacher"]["label"] == str(pipeline_folder)
    assert entry["teacher"]["weights"] == before["source"]["weights"]
    assert set(entry["loss"]) == {"before", "after", "teacher"}
    assert "finetuned for 6 steps" in (tuned / "README.md").read_text()
    grids = sorted((tuned.parent / "out-logs" / "samples").iterdir())
    assert (tuned / "samples.png").read_bytes() == grids[-1].read_bytes() != grids[0].read_bytes()
    names = [sorted(p.relative_to(f).as_posix() for p in f.rglob("*")) for f in (pruned, tuned)]
    assert names[0] == names[1]
    x = torch.randn(1, 3, 16, 16)
    assert not torch.equal(gfprune_cli.load(pruned)(x, 5).sample, gfprune_cli.load(tuned)(x, 5).sample)


def test_a_scheduler_without_a_length_is_used(pruned: Path, pipeline_folder: Path, tmp_path: Path) -> None:
    """Wuerstchen's runs in continuous time, and asking diffusers for its length raises."""
    dense, narrow = (
        shutil.copytree(folder, tmp_path / name)
        for name, folder in (("dense", pipeline_folder), ("pruned", pruned))
    )
    for folder in (dense, narrow):
        DDPMWuerstchenScheduler().save_pretrained(folder / "scheduler")
    gfprune_cli.finetune(narrow, teacher=str(dense), out=tmp_path / "out", **BRIEF | dict(steps=1))
    assert digest(tmp_path / "out") != digest(pruned)


def test_the_averaged_weights_are_written(pruned: Path, tmp_path: Path) -> None:
    """With one step the average is that step's weight; with a decay of 0 it always is the last one."""
    common = BRIEF | dict(steps=3, learning_rate=1e-3, warmup=0)
    gfprune_cli.finetune(pruned, out=tmp_path / "last", sample_every=0, ema=0.0, **common)
    gfprune_cli.finetune(pruned, out=tmp_path / "mean", sample_every=0, **common)
    start, last, mean = (
        gfprune_cli.load(folder).get_parameter("conv_in.weight").detach()
        for folder in (pruned, tmp_path / "last", tmp_path / "mean")
    )
    assert 0 < float((mean - start).norm()) < float((last - start).norm()) * 1.5
    assert not torch.equal(mean, last)


def test_logs_can_be_followed_and_show_samples(tuned: Path) -> None:
    logs = tuned.parent / "out-logs"
    lines = [json.loads(line) for line in (logs / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all({"loss", "denoise", "distill", "lr", "grad_norm", "seconds"} <= set(line) for line in lines)
    pictures = sorted(path.name for path in (logs / "samples").iterdir())
    assert pictures == ["step-000003.png", "step-000006.png"]
    with Image.open(logs / "samples" / "step-000006.png") as picture:
        assert picture.height == 2 * 64


def test_same_seed_same_bytes_and_another_seed_differs(pruned: Path, tuned: Path, tmp_path: Path) -> None:
    gfprune_cli.finetune(pruned, out=tmp_path / "same", sample_every=0, save_every=0, **BRIEF)
    assert digest(tmp_path / "same") == digest(tuned)
    gfprune_cli.finetune(pruned, out=tmp_path / "other", sample_every=0, seed=1, **BRIEF)
    assert digest(tmp_path / "other") != digest(tuned)


@pytest.mark.matrix(2)
@pytest.mark.parametrize("stop_at", range(1, 14, 3))
def test_a_stopped_run_resumes_to_the_same_bytes(
    pruned: Path, tuned: Path, tmp_path: Path, stop_at: int
) -> None:
    """Stopped at any report of the loop, within a step or between two."""
    seen = 0

    def stop(event: Event) -> None:
        nonlocal seen
        seen += event.phase in ("finetune", "pass")
        if seen == stop_at:
            raise Interrupted("stop", signal.SIGTERM)

    out = tmp_path / "out"
    with contextlib.suppress(Interrupted):  # at the very last event there is nothing left to stop
        gfprune_cli.finetune(pruned, out=out, progress=stop, sample_every=0, **BRIEF)
    if not out.exists():
        with pytest.raises(UsageError, match="--resume"):
            gfprune_cli.finetune(pruned, out=out, logs=tmp_path / "logs", **BRIEF)
        with pytest.raises(UsageError, match="other distill"):
            gfprune_cli.finetune(pruned, out=out, resume=True, distill=0.5, **BRIEF)
        gfprune_cli.finetune(pruned, out=out, resume=True, sample_every=0, **BRIEF)
    assert digest(out) == digest(tuned)
    lines = [
        json.loads(line)["step"] for line in (tmp_path / "out-logs/metrics.jsonl").read_text().splitlines()
    ]
    assert lines == [1, 2, 3, 4, 5, 6]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out-logs"]


@pytest.mark.matrix(2)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_process_resumes_to_the_same_bytes(
    pruned: Path, tuned: Path, tmp_path: Path, server: Server, number: signal.Signals
) -> None:
    out = tmp_path / "out"
    command = ["finetune", "--model", pruned, "--out", out, "--save-every", 2, *flags(**BRIEF)]
    killed = server.run(*command, phase="finetune", nth=2, signals=[number])
    assert killed.code == (143 if number == signal.SIGTERM else -signal.SIGKILL)
    assert not out.exists()
    done = server.run(*command, "--resume")
    assert done.code == 0, done.stderr
    assert done.stdout == f"{out}\n"
    assert digest(out) == digest(tuned)


@pytest.mark.slow
def test_resuming_a_finished_run_says_the_same_again(pruned: Path, tmp_path: Path) -> None:
    """A job that is killed after the output appeared, and repeated, succeeds; only on its own output."""
    out, brief = tmp_path / "out", BRIEF | dict(steps=1)
    first = gfprune_cli.finetune(pruned, out=out, sample_every=0, **brief)
    before = digest(out)
    again = gfprune_cli.finetune(pruned, out=out, sample_every=0, resume=True, **brief)
    assert dataclasses.replace(again, seconds=0) == dataclasses.replace(first, seconds=0)
    assert digest(out) == before
    with pytest.raises(UsageError, match="another run"):
        gfprune_cli.finetune(pruned, out=out, resume=True, **(brief | dict(steps=2)))


def test_logs_of_a_run_killed_before_its_first_state_are_its_own(pruned: Path, tmp_path: Path) -> None:
    """The metrics file is there and no state yet: `--resume` starts over instead of refusing."""
    out, brief = tmp_path / "out", BRIEF | dict(steps=2)

    def die(event: Event) -> None:
        if event.phase == "finetune":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gfprune_cli.finetune(pruned, out=out, sample_every=0, progress=die, **brief)
    assert (tmp_path / "out-logs" / "metrics.jsonl").exists()
    gfprune_cli.finetune(pruned, out=out, sample_every=0, resume=True, **brief)
    steps = [json.loads(line)["step"] for line in (tmp_path / "out-logs" / "metrics.jsonl").open()]
    assert steps == [1, 2]


@pytest.mark.parametrize("more", [[], ["--lora", "2"], ["--by-block", "--features", "0"]])
def test_two_processes_train_what_one_does(
    pruned: Path, tuned: Path, server: Server, tmp_path: Path, more: list[str]
) -> None:
    """With the same effective batch, to float tolerance; test_eval_command.py has `accelerate launch`."""
    out = tmp_path / "out"
    command = ["finetune", "--model", pruned, "--device", "cpu", "--json", *flags(**BRIEF), *more]
    if more:
        tuned = tmp_path / "one"
        assert server.run(*command, "--out", tuned).code == 0
    done = server.together(2, *command, "--out", out)
    assert [one.code for one in done] == [0, 0], done[0].stderr[-2000:]
    assert json.loads(done[0].stdout)["processes"] == 2
    start, one, two = (
        nn.utils.parameters_to_vector(gfprune_cli.load(folder).parameters()).detach()
        for folder in (pruned, tuned, out)
    )
    # over the whole network: the keys' biases, which softmax ignores, follow nothing but rounding
    assert float((one - two).norm()) < 0.005 * float((one - start).norm())


def test_every_loss_precision_and_option_runs(pruned: Path, tmp_path: Path) -> None:
    everything = dict(features=0.1, jacobian=0.01, min_snr=5.0, timesteps="antithetic", checkpointing=True)
    cases: list[dict[str, Any]] = [
        everything | dict(precision="bf16", channels_last=True, micro_batch=3),
        everything | dict(precision="fp16", weight_decay=0.01, optimizer="muon"),
        dict(denoise=1.0, distill=0.0),
    ]
    for number, case in enumerate(cases):
        out = tmp_path / str(number)
        result = gfprune_cli.finetune(pruned, out=out, sample_every=0, **BRIEF | dict(steps=2) | case)
        assert result.loss["after"] != result.loss["before"]
        lines = (tmp_path / f"{number}-logs" / "metrics.jsonl").read_text().splitlines()
        terms = {"features", "jacobian"} if "features" in case else set()
        assert terms <= set(json.loads(lines[0]))


def test_compiled_networks_are_what_is_trained(
    pruned: Path, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = []
    compile_ = torch.compile

    def record(network: torch.nn.Module) -> Any:
        compiled.append(network)
        return compile_(network, backend="eager")  # traced as by the default one, which needs a C++ compiler

    monkeypatch.setattr(torch, "compile", record)
    common: dict[str, Any] = dict(sample_every=0, features=0.1, **BRIEF | dict(steps=2))
    gfprune_cli.finetune(pruned, out=tmp_path / "compiled", compile=True, **common)
    assert len(compiled) == 2
    gfprune_cli.finetune(pruned, out=tmp_path / "eager", **common)
    losses = [
        [
            json.loads(line)["loss"]
            for line in (tmp_path / f"{name}-logs/metrics.jsonl").read_text().splitlines()
        ]
        for name in ("compiled", "eager")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.matrix(2)
@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_other_predictions_and_native_layout(tmp_path: Path, prediction: str) -> None:
    from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel

    torch.manual_seed(0)
    dense = tmp_path / "dense"
    DDPMPipeline(
        UNet2DModel(**TINY, num_class_embeds=3), DDIMScheduler(prediction_type=prediction)
    ).save_pretrained(dense)
    options: dict[str, Any] = dict(sparsity=0.4, layout="native")
    gfprune_cli.prune(str(dense), out=tmp_path / "pruned", **options, **ONE_SHOT)
    settings: dict[str, Any] = BRIEF | dict(features=0.1, min_snr=5.0, steps=4)
    result = gfprune_cli.finetune(tmp_path / "pruned", out=tmp_path / "tuned", **settings)
    assert result.class_name == "UNet2DModel"
    assert (tmp_path / "tuned-logs/samples/step-000004.png").exists()


def test_a_finetuned_checkpoint_can_be_finetuned_again_on_data(tuned: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(5):
        Image.new("RGB", (16, 16), (40 * number, 90, 200)).save(photos / f"{number}.png")
    settings = BRIEF | dict(images=None, data=str(photos))
    gfprune_cli.finetune(tuned, out=tmp_path / "again", sample_every=0, **settings)
    record = json.loads((tmp_path / "again" / "gfprune.json").read_text())
    assert len(record["finetune"]) == 2
    assert len(record["finetune"][1]["data"]) == 64
    rates = [run["resolved"]["learning_rate"] for run in record["finetune"]]  # after 2 and after 8 steps
    assert [run["resolved"]["denoise"] for run in record["finetune"]] == [0.1, 0.1], "of short runs"
    assert rates == [pytest.approx(1.5e-3 * 6 / 8), pytest.approx(1.5e-3 * 6 / 14)]
    assert (tmp_path / "again" / "README.md").read_text().count("Then finetuned") == 2


def test_the_rate_of_a_long_run_is_that_of_the_loss_that_it_begins_with(
    pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it trains with is what the record says; nothing trains here."""
    losses, recipes = iter((0.1, 0.3, 0.2)), []  # of the teacher, before and after
    monkeypatch.setattr(FinetuneJob, "loss", lambda *given: next(losses))
    monkeypatch.setattr(job, "recover", lambda *given, **settings: recipes.append(given[4]))
    long: dict[str, Any] = BRIEF | dict(steps=1600, batch=8, optimizer="soap", sample_every=0)
    result = gfprune_cli.finetune(pruned, out=tmp_path / "out", **long)
    rate = json.loads((tmp_path / "out" / "gfprune.json").read_text())["finetune"][0]["resolved"][
        "learning_rate"
    ]
    counts = json.loads((pruned / "gfprune.json").read_text())["params"]
    full = SOAP_RATE * (1 - counts["after"] / counts["before"]) * 1600 / (1600 + ONE_SHOT["recover"])
    assert (result.loss["teacher"], result.loss["before"]) == (0.1, 0.3)
    assert rate == recipes[0].learning_rate == pytest.approx(full * (2 * 3200 / 12800) ** 0.5)


def test_adapters_are_merged_into_a_checkpoint_like_any_other(
    pruned: Path, tuned: Path, tmp_path: Path
) -> None:
    """Layers that pruning did not touch and all that has no adapter keep their bytes; stopped runs resume."""
    settings, seen = BRIEF | dict(lora=2, optimizer="muon", save_every=2, sample_every=0), 0
    told = []

    def stop(event: Event) -> None:
        nonlocal seen
        told.append(event.text or "")
        seen += event.phase == "finetune"
        if seen == 3:
            raise Interrupted("stop", signal.SIGTERM)

    result = gfprune_cli.finetune(pruned, out=tmp_path / "whole", **settings)
    with pytest.raises(Interrupted):
        gfprune_cli.finetune(pruned, out=tmp_path / "parts", progress=stop, **settings)
    gfprune_cli.finetune(pruned, out=tmp_path / "parts", resume=True, **settings)
    assert digest(tmp_path / "parts") == digest(tmp_path / "whole")
    assert any("adapters of rank 2" in text for text in told)
    assert result.loss["after"] != result.loss["before"]
    names = [sorted(p.relative_to(f).as_posix() for p in f.rglob("*")) for f in (tuned, tmp_path / "whole")]
    assert names[0] == names[1]
    before, after = (gfprune_cli.load(folder).state_dict() for folder in (pruned, tmp_path / "whole"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    touched = json.loads((pruned / "gfprune.json").read_text())["map"]["layers"]
    assert changed
    assert changed <= {f"{name}.weight" for name in touched}


def test_images_of_class_folders_train_with_their_own_labels(tmp_path: Path) -> None:
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    torch.manual_seed(0)
    dense = tmp_path / "dense"
    DDPMPipeline(UNet2DModel(**TINY, num_class_embeds=3), DDPMScheduler()).save_pretrained(dense)
    for number in range(6):
        folder = tmp_path / "photos" / ("cat", "dog")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (40 * number, 90, 200)).save(folder / f"{number}.png")
    told: list[str] = []
    options: dict[str, Any] = dict(
        data=str(tmp_path / "photos"), progress=lambda event: told.append(event.text or "")
    )
    gfprune_cli.prune(str(dense), sparsity=0.5, out=tmp_path / "pruned", **ONE_SHOT | options)
    gfprune_cli.finetune(
        tmp_path / "pruned", out=tmp_path / "out", sample_every=0, **BRIEF | options | dict(images=None)
    )
    assert sum("'cat' is 0, 'dog' is 1" in text for text in told) == 2
    assert not any("at random" in text for text in told)


@pytest.mark.parametrize("optimizer", ["adafactor", "muon"])
def test_a_teacher_in_bfloat16_without_an_average(pruned: Path, tmp_path: Path, optimizer: str) -> None:
    settings = BRIEF | dict(steps=2, optimizer=optimizer, teacher_precision="bf16", ema=0.0)
    result = gfprune_cli.finetune(pruned, out=tmp_path / "out", sample_every=0, **settings)
    assert result.loss["after"] != result.loss["before"]


def test_a_dry_run_checks_the_inputs_and_writes_nothing(
    pruned: Path, pipeline_folder: Path, tmp_path: Path, gfprune: Gfprune
) -> None:
    done = gfprune("finetune", "--model", pruned, "--dry-run", "--json", cwd=tmp_path)
    document = json.loads(done.stdout)
    assert document["output"] is None
    assert document["teacher"] == str(pipeline_folder)
    assert document["loss"] == {"before": None, "after": None, "teacher": None}
    assert list(tmp_path.iterdir()) == []


def test_a_class_that_cannot_recompute_is_refused_before_the_run(
    pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import UNet2DModel

    monkeypatch.setattr(UNet2DModel, "_supports_gradient_checkpointing", False)
    with pytest.raises(UsageError, match="--checkpointing: a PrunedUNet2DModel cannot recompute"):
        gfprune_cli.finetune(pruned, out=tmp_path / "out", checkpointing=True, dry_run=True)


def test_json_has_the_promised_keys(pruned: Path, tmp_path: Path, gfprune: Gfprune) -> None:
    done = gfprune("finetune", "--model", pruned, "--json", "-q", *flags(**BRIEF), cwd=tmp_path)
    assert done.stderr == ""
    document = json.loads(done.stdout)
    assert {"schema_version", "command", "output", "steps", "loss", "seconds"} <= set(document)
    assert document["output"] == "out-finetuned"
    assert (tmp_path / "out-finetuned" / WEIGHTS).exists()


def test_tensorboard_gets_what_the_metrics_file_gets(pruned: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    gfprune_cli.finetune(pruned, out=tmp_path / "out", logger="tensorboard", sample_every=0, **BRIEF)
    events = EventAccumulator(str(tmp_path / "out-logs" / "out"))
    events.Reload()
    lines = [json.loads(line) for line in (tmp_path / "out-logs/metrics.jsonl").read_text().splitlines()]
    logged = [event.value for event in events.Scalars("loss")]
    assert logged == pytest.approx([line["loss"] for line in lines])


def other_teacher(folder: Path, **changes: Any) -> Path:
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    torch.manual_seed(1)
    scheduler = DDPMScheduler(prediction_type=changes.pop("prediction_type", "epsilon"))
    DDPMPipeline(UNet2DModel(**TINY | changes), scheduler).save_pretrained(folder)
    return folder


def test_another_teacher_of_the_same_architecture_is_taken_and_said(pruned: Path, tmp_path: Path) -> None:
    notices = []
    teacher = other_teacher(tmp_path / "teacher")
    gfprune_cli.finetune(
        pruned, teacher=str(teacher), out=tmp_path / "out", sample_every=0,
        progress=lambda event: notices.append(event.text) if event.phase == "notice" else None, **BRIEF,
    )  # fmt: skip
    assert any("not the weights that this checkpoint was pruned from" in text for text in notices)


def arguments_that_must_fail(
    case: str, pruned: Path, dense: Path, folder: Path
) -> tuple[list[str], int, str]:
    """(arguments, exit code, part of the message) of a run that cannot be."""
    copy = folder / "model"
    shutil.copytree(pruned, copy)
    record = json.loads((copy / "gfprune.json").read_text())
    if case == "never pruned":
        return ["--model", str(dense)], 2, "was never pruned"
    if case == "no model":
        return [], 2, "--model is missing"
    if case == "another architecture":
        return ["--teacher", str(other_teacher(folder / "t", layers_per_block=2))], 2, "layers_per_block"
    if case == "another resolution":
        return ["--teacher", str(other_teacher(folder / "t", sample_size=32))], 2, "sample_size 32"
    if case == "another prediction":
        return ["--teacher", str(other_teacher(folder / "t", prediction_type="sample"))], 2, "prediction_type"
    if case == "teacher missing":
        return ["--teacher", str(folder / "nowhere")], 2, "--teacher"
    if case == "teacher changed":
        record["source"]["weights"] = dict.fromkeys(record["source"]["weights"], "0" * 64)
    if case == "teacher gone":
        record["source"]["label"] = str(folder / "gone")
    if case == "damaged record":
        record["kept"] = {"conv_in": [-1]}
    if case == "record of another model":
        record["kept"] = {"conv_in": [0, 1]}
    if case == "zero images":
        (folder / "empty").mkdir()
        return ["--data", str(folder / "empty")], 2, "no image in it"
    if case == "no loss":
        return ["--denoise", "0", "--distill", "0"], 2, "all loss weights are 0"
    if case == "logs in the output":
        return ["--logs", str(folder / "result" / "logs")], 2, "lies in --out"
    if case == "logs in the data":
        (folder / "data").mkdir()
        return ["--data", str(folder / "data"), "--logs", str(folder / "data" / "logs")], 2, "lie in --data"
    if case == "too much at once":
        return ["--compile", "--checkpointing", "--features", "1"], 2, "do not go together"
    if case == "record without numbers":
        del record["sparsity"]
    if case == "record with another history":
        record["finetune"] = [{"x": 1}]
    if case == "kept channels out of order":
        record["kept"] = {name: kept[::-1] for name, kept in record["kept"].items()}
    if case == "unknown optimizer":
        return ["--optimizer", "sgd"], 2, "--optimizer"
    if case == "unknown logger":
        return ["--logger", "paper"], 2, "--logger"
    if case == "logs of another run":
        (folder / "result-logs").mkdir()
        (folder / "result-logs" / "metrics.jsonl").touch()
        return [], 2, "another run"
    (copy / "gfprune.json").write_text(json.dumps(record))
    messages = {
        "teacher changed": (1, "have changed"),
        "teacher gone": (1, "name it with --teacher"),
        "damaged record": (1, "is damaged"),
        "record without numbers": (1, "is damaged: sparsity"),
        "record with another history": (1, "is damaged: finetune"),
        "kept channels out of order": (1, "do not ascend"),
        "record of another model": (1, "belongs to another model"),
    }
    extra = ["--features", "0.1"] if case == "record of another model" else []
    return ["--model", str(copy), *extra], *messages[case]


@pytest.mark.parametrize(
    "case",
    [
        "never pruned", "no model", "another architecture", "another resolution", "another prediction",
        "teacher missing", "teacher changed", "teacher gone", "damaged record",
        "record of another model", "zero images", "no loss", "unknown optimizer", "unknown logger",
        "logs of another run",
        "logs in the output", "logs in the data", "too much at once", "record without numbers",
        "record with another history", "kept channels out of order",
    ],
)  # fmt: skip
def test_bad_input_gets_one_line_and_nothing_is_written(
    case: str, pruned: Path, pipeline_folder: Path, tmp_path: Path, gfprune: Gfprune
) -> None:
    arguments, code, message = arguments_that_must_fail(case, pruned, pipeline_folder, tmp_path)
    if "--model" not in arguments and case != "no model":
        arguments = ["--model", str(pruned), *arguments]
    done = gfprune("finetune", "-q", "--out", tmp_path / "result", *flags(**BRIEF), *arguments)
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert message in done.stderr
    assert not (tmp_path / "result").exists()


def test_a_foreign_or_damaged_state_is_refused_and_kept(pruned: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def stop(event: Event) -> None:
        if event.phase == "finetune" and event.step == 3:
            raise Interrupted("stop", signal.SIGTERM)

    with pytest.raises(Interrupted):
        gfprune_cli.finetune(pruned, out=out, progress=stop, save_every=2, sample_every=0, **BRIEF)
    folder = tmp_path / ".out.gfprune-state"
    states = sorted(path.name for path in folder.iterdir())
    assert len(states) == 2, "two good states"
    for path in folder.rglob("*"):
        assert path.is_dir() or path.suffix in (".json", ".safetensors")
    with pytest.raises(UsageError, match="other steps"):
        gfprune_cli.finetune(pruned, out=out, resume=True, **BRIEF | dict(steps=9))
    for state in folder.iterdir():
        (state / "state.safetensors").write_bytes(b"nonsense")
    with pytest.raises(GfpruneError, match=r"no state in .* is intact"):
        gfprune_cli.finetune(pruned, out=out, resume=True, **BRIEF)
    assert sorted(path.name for path in folder.iterdir()) == states
    assert not out.exists()


def test_a_damaged_newest_state_falls_back_to_the_one_before(
    pruned: Path, tuned: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"

    def stop(event: Event) -> None:
        if event.phase == "finetune" and event.step == 5:
            raise Interrupted("stop", signal.SIGTERM)

    with pytest.raises(Interrupted):
        gfprune_cli.finetune(pruned, out=out, progress=stop, save_every=2, sample_every=0, **BRIEF)
    newest = max((tmp_path / ".out.gfprune-state").iterdir())
    (newest / "state.safetensors").write_bytes(b"nonsense")
    gfprune_cli.finetune(pruned, out=out, resume=True, sample_every=0, **BRIEF)
    assert digest(out) == digest(tuned)


def test_a_signal_within_a_grid_saves_all_steps_before_it(pruned: Path, tuned: Path, tmp_path: Path) -> None:
    in_a_row = 0

    def stop(event: Event) -> None:
        nonlocal in_a_row
        in_a_row = in_a_row + 1 if event.phase == "pass" else 0
        if in_a_row == 2 and seen_steps:  # only a grid makes two passes in a row
            raise Interrupted("stop", signal.SIGTERM)
        if event.phase == "finetune":
            seen_steps.append(event.step)

    seen_steps: list[int] = []
    out = tmp_path / "out"
    settings: dict[str, Any] = dict(out=out, save_every=0, sample_every=3, **BRIEF)
    with pytest.raises(Interrupted):
        gfprune_cli.finetune(pruned, progress=stop, **settings)
    assert seen_steps == [1, 2, 3]
    state = max((tmp_path / ".out.gfprune-state").iterdir()) / "state.json"
    assert json.loads(state.read_text())["numbers"]["done"] == 3
    gfprune_cli.finetune(pruned, resume=True, **settings)
    assert digest(out) == digest(tuned)


def test_a_bare_model_keeps_its_schedule(tmp_path: Path) -> None:
    """Else the pruned model would be taught the noise of another one."""
    from diffusers import DDIMScheduler, UNet2DModel

    torch.manual_seed(0)
    bare = tmp_path / "bare"
    UNet2DModel(**TINY).save_pretrained(bare)
    DDIMScheduler(prediction_type="v_prediction").save_pretrained(bare)
    gfprune_cli.prune(str(bare), sparsity=0.4, out=tmp_path / "pruned", **ONE_SHOT)
    gfprune_cli.finetune(tmp_path / "pruned", out=tmp_path / "tuned", sample_every=0, **BRIEF | dict(steps=2))
    schedule = json.loads((tmp_path / "tuned" / "scheduler_config.json").read_text())
    assert schedule["prediction_type"] == "v_prediction"


def test_a_signal_while_the_teacher_loads_is_a_signal(pruned: Path, tmp_path: Path) -> None:
    loads = 0

    def stop(event: Event) -> None:
        nonlocal loads
        loads += event.phase == "load"
        if loads == 2:
            raise Interrupted("stop", signal.SIGTERM)

    with pytest.raises(Interrupted):
        gfprune_cli.finetune(pruned, out=tmp_path / "out", progress=stop, **BRIEF)


def test_resume_does_not_touch_the_metrics_of_another_run(pruned: Path, tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / "metrics.jsonl").write_text("another run's")
    with pytest.raises(UsageError, match="another run"):
        gfprune_cli.finetune(pruned, out=tmp_path / "out", logs=logs, resume=True, **BRIEF)
    assert (logs / "metrics.jsonl").read_text() == "another run's"


def test_an_exported_dense_model_was_never_pruned_and_an_exported_pruned_one_was(
    pruned: Path, pipeline_folder: Path, tmp_path: Path
) -> None:
    gfprune_cli.export(str(pipeline_folder), format="safetensors", out=tmp_path / "dense")
    with pytest.raises(UsageError, match="was never pruned"):
        gfprune_cli.finetune(tmp_path / "dense", dry_run=True)
    gfprune_cli.export(str(pruned), format="safetensors", out=tmp_path / "narrow")
    assert gfprune_cli.finetune(tmp_path / "narrow", dry_run=True).teacher == str(pipeline_folder)
