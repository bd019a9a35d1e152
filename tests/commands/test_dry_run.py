"""What a run refuses before it reads a weight its dry run refuses too: the same line, the same exit code.

pytest tests/test_dry_run.py
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ONE_SHOT, quick_flags
from pipelines import FAMILIES, PNDMScheduler, conditional_unet, stable_diffusion
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import gfprune_cli
from gfprune_cli.checkpoint import reader
from gfprune_cli.cli.main import app
from gfprune_cli.outputs.state import StateFolder
from gfprune_cli.pruning import job

WEIGHTS = "diffusion_pytorch_model.safetensors"
Change = Callable[[Path], object]


@dataclass(frozen=True)
class Case:
    """One way in which a run cannot be.

    Args:
        said: a part of the line.
        code: of the exit.
        change: makes a copy of the tiny pipeline wrong.
        flags: of `prune`.
    """

    said: str
    code: int
    change: Change = lambda folder: None
    flags: tuple[str, ...] = ()


def configured(part: str, **values: Any) -> Change:
    """Other settings in a JSON file of the checkpoint; None removes one."""

    def change(folder: Path) -> None:
        path = folder / part
        config = json.loads(path.read_text()) | values
        path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))

    return change


def retensored(rename: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Change:
    def change(folder: Path) -> None:
        path = folder / "unet" / WEIGHTS
        save_file(rename(load_file(path)), path, {"format": "pt"})

    return change


def without_scheduler(folder: Path) -> None:
    configured("model_index.json", scheduler=None)(folder)
    shutil.rmtree(folder / "scheduler")


def of_family(build: Callable[[Path], Path]) -> Change:
    def change(folder: Path) -> None:
        shutil.rmtree(folder)
        build(folder)

    return change


def tied(folder: Path) -> Path:
    unet = conditional_unet(block_out_channels=(32, 32), attention_head_dim=4)
    return stable_diffusion(folder, unet, PNDMScheduler(skip_prk_steps=True))


def interrupted(folder: Path) -> None:
    StateFolder(folder.parent / "out", {}).save({"x": torch.zeros(1)}, {})


UNET, SCHEDULER = "unet/config.json", "scheduler/scheduler_config.json"
NOT_UTF8 = os.fsdecode(b"caf\xe9")  # as old archives leave names
ZERO_SNR = dict(rescale_betas_zero_snr=True, clip_sample=False, _class_name="DDIMScheduler")
CASES = {
    "no sample size": Case("has no sample_size", 1, configured(UNET, sample_size=None)),
    "class embeddings": Case("class_embed_type timestep", 1, configured(UNET, class_embed_type="timestep")),
    "unsupported scheduler": Case(
        "is not supported", 1, configured(SCHEDULER, _class_name="KarrasVeScheduler")
    ),
    "unknown scheduler": Case("no scheduler of diffusers", 1, configured(SCHEDULER, _class_name="Nothing")),
    "unknown prediction": Case("prediction_type", 1, configured(SCHEDULER, prediction_type="future")),
    "no scheduler": Case("has no scheduler", 1, without_scheduler),
    "zero SNR": Case("zero terminal SNR", 1, configured(SCHEDULER, **ZERO_SNR)),
    "EMA keys": Case("has no place in", 1, retensored(lambda found: found | {"ema.decay": torch.zeros(1)})),
    "missing tensor": Case(
        "is missing from",
        1,
        retensored(lambda found: {k: v for k, v in found.items() if k != "conv_in.bias"}),
    ),
    "other shape": Case(
        "belongs to another model", 1, retensored(lambda found: found | {"conv_in.bias": torch.zeros(3)})
    ),
    "whole numbers": Case(
        "floating-point",
        1,
        retensored(lambda found: found | {"conv_in.bias": torch.zeros(8, dtype=torch.int8)}),
    ),
    "budget": Case("cannot be reached", 2, flags=("--sparsity", "0.999")),
    "native": Case("widths are tied", 2, of_family(tied), flags=("--layout", "native")),
    "prompts without a pipeline that takes them": Case("--prompts", 2, flags=("--prompts", "prompts.txt")),
    "prompts that are not there": Case(
        "nowhere.txt", 2, of_family(FAMILIES["stable-diffusion"]), flags=("--prompts", "nowhere.txt")
    ),
    "prompts for labels": Case(
        "takes no text",
        2,
        of_family(FAMILIES["dit"]),
        flags=("--prompts", "nowhere.txt", "--sparsity", "0.1"),
    ),
    "no size": Case("--size", 2, of_family(FAMILIES["stable-diffusion"]), flags=("--size", "large")),
    "a bare transformer and data": Case(
        "latents",
        2,
        of_family(
            lambda folder: shutil.move(FAMILIES["dit"](folder / "whole") / "transformer", folder / "bare")
        ),
        flags=("--data", ".", "--sparsity", "0.1"),
    ),
    "output in use": Case(
        "is not empty", 2, lambda folder: (folder.parent / "out" / "mine").mkdir(parents=True)
    ),
    "output is the input": Case("would replace --model", 2, flags=("--out", "model", "--force")),
    "output that is no text": Case("not text in UTF-8", 2, flags=("--out", NOT_UTF8)),
    "interrupted run": Case("left its state", 2, interrupted),
}


def line(*arguments: object) -> tuple[str, int]:
    """The error line and the exit code of a command."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    errors = [text for text in done.stderr.splitlines() if text.startswith("error: ")]
    assert len(errors) <= 1, done.stderr
    return (errors[0] if errors else done.stderr), done.exit_code


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a weight fails."""
    monkeypatch.setattr(reader, "_read_tensors", lambda *_: pytest.fail("weights were read"))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("no_weights")
def test_the_dry_run_refuses_what_the_run_refuses(
    smallest_folder: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, model = CASES[name], tmp_path / "model"
    monkeypatch.chdir(tmp_path)
    shutil.copytree(smallest_folder, model)
    case.change(model)
    if (model / "bare").is_dir():
        model = model / "bare"
    if name == "output is the input":
        (model / "gfprune.json").write_text("{}")
    sparsity = () if "--sparsity" in case.flags else ("--sparsity", "0.3")
    flags = [*sparsity, "--out", "out", *quick_flags(), *case.flags]
    before = sorted(tmp_path.rglob("*"))
    dry = line("prune", "--model", model, *flags, "--dry-run")
    assert sorted(tmp_path.rglob("*")) == before
    assert case.said in dry[0]
    assert dry == line("prune", "--model", model, *flags)
    assert dry[1] == case.code


@pytest.mark.usefixtures("no_weights")
def test_a_model_in_a_folder_that_is_no_text(
    smallest_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(smallest_folder, NOT_UTF8)
    arguments = ("prune", "--model", NOT_UTF8, "--out", "out", *quick_flags())
    dry = line(*arguments, "--dry-run")
    assert "rename the folder" in dry[0]
    assert dry == line(*arguments)


@pytest.mark.usefixtures("no_weights")
def test_memory_is_one_of_the_checks(
    smallest_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "available", lambda device: 1 << 20)
    arguments = ("prune", "--model", smallest_folder, "--out", tmp_path / "out")
    dry = line(*arguments, "--dry-run")
    assert "are free" in dry[0]
    assert dry == line(*arguments)
    assert dry[1] == 1


def test_the_dry_run_of_finetune_refuses_what_the_run_refuses(smallest_folder: Path, tmp_path: Path) -> None:
    pruned = tmp_path / "pruned"
    gfprune_cli.prune(str(smallest_folder), sparsity=0.3, out=pruned, **ONE_SHOT | dict(recover=0))
    brief = ("--steps", 1, "--images", 8, "--sample-steps", 2, "--batch", 2)
    whole = load_file(pruned / "unet" / WEIGHTS)
    more = whole | {"ema.decay": torch.zeros(1)}

    def logged(folder: Path) -> None:
        (folder.parent / "out-logs").mkdir()
        (folder.parent / "out-logs" / "metrics.jsonl").write_text("{}\n")

    cases = [
        Case("has no place in", 1, lambda folder: save_file(more, folder / "unet" / WEIGHTS)),
        Case("is of another run", 2, logged),
        Case("left its state", 2, interrupted),
        Case("--prompts", 2, flags=("--prompts", "nowhere.txt")),
        Case("would replace --model", 2, flags=("--out", str(tmp_path / "4" / "model"), "--force")),
    ]
    for number, case in enumerate(cases):
        model = tmp_path / str(number) / "model"
        shutil.copytree(pruned, model)
        case.change(model)
        arguments = ("finetune", "--model", model, "--out", model.parent / "out", *brief, *case.flags)
        dry = line(*arguments, "--dry-run")
        assert case.said in dry[0]
        assert dry == line(*arguments)
        assert dry[1] == case.code
