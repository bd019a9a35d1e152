"""The command line's contract: stdout, stderr, exit codes, one-line errors, nothing written on failure."""

import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SMALLEST, Gfprune, fresh, quick_flags
from forked import Server
from typer.testing import CliRunner

import gfprune_cli
from gfprune_cli.cli.main import app
from gfprune_cli.cli.session import one_line
from gfprune_cli.recipes.options import option_names
from gfprune_cli.recipes.prune import PruneRecipe

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
PRUNE_KEYS = {
    "schema_version", "command", "model", "output", "component", "layout", "criterion", "seed", "sparsity",
    "params", "macs", "bytes", "loss", "scoring_gradients", "refit", "seconds", "seconds_by_phase",
}  # fmt: skip
SHARES = {"target", "achieved", "of", "params", "macs"}
LOSSES = {"before", "masked", "removed", "recovered"}


def test_stdout_is_the_output_path_and_nothing_else(smallest_folder: Path, tmp_path: Path) -> None:
    """`OUT=$(gfprune prune ...)` works, logs carry no escape codes, the default name says what it is."""
    done = fresh("prune", "--model", smallest_folder, "--sparsity", "0.4", *quick_flags(), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "tiny-taylor-both40\n"
    assert (tmp_path / "tiny-taylor-both40" / WEIGHTS).exists()
    assert "\x1b" not in done.stderr
    said = "".join(done.stderr.split())  # the table breaks its title, inside words where its path is long
    found = re.search(r"tiny:(\d+\.\d)%ofparametersand(\d+\.\d)%ofMACsremoved", said)
    assert found, done.stderr
    assert 40 <= min(map(float, found.groups())) < 41
    for row in ("denoising loss, masked", "after removal", "after recovery"):
        assert row in done.stderr


def test_json_is_one_document_with_every_promised_key(
    smallest_folder: Path, tmp_path: Path, gfprune: Gfprune
) -> None:
    done = gfprune(
        "prune", "--model", smallest_folder, "--out", tmp_path / "out", "--json", "--quiet", *quick_flags()
    )
    document = json.loads(done.stdout)
    assert document.keys() >= PRUNE_KEYS
    assert document["schema_version"] == 1
    assert document["params"]["after"] < document["params"]["before"]
    assert document["sparsity"].keys() == SHARES
    assert document["loss"].keys() == LOSSES
    assert None not in document["loss"].values()
    assert document["refit"].keys() == {"draws", "iterations"}
    assert document["seconds_by_phase"].keys() >= {"scoring", "refit", "removal", "recovery", "writing"}
    assert done.stderr == ""


def test_dry_run_plans_and_writes_nothing(pipeline_folder: Path, tmp_path: Path, gfprune: Gfprune) -> None:
    done = gfprune("prune", "--model", pipeline_folder, "--dry-run", "--json", cwd=tmp_path)
    document = json.loads(done.stdout)
    assert document["output"] is None
    sparsity = document["sparsity"]
    assert abs(sparsity["achieved"] - 0.5) <= 0.01
    assert sparsity["achieved"] == min(sparsity["params"], sparsity["macs"])
    assert set(document["loss"].values()) == {document["refit"]} == {None}
    assert list(tmp_path.iterdir()) == []


def test_a_budget_out_of_reach_names_the_nearest_which_is_in_reach(smallest_folder: Path) -> None:
    ask = ["prune", "--model", str(smallest_folder), "--dry-run", "--json", "--quiet", "--sparsity"]
    refused = CliRunner().invoke(app, [*ask, "0.999"])
    assert refused.exit_code == 2
    found = re.search(
        r"nearest is (0\.\d+) \(which removes (0\.\d+) of params, (0\.\d+) of macs\)", refused.stderr
    )
    assert found, refused.stderr
    nearest, *shares = map(float, found.groups())
    assert nearest <= min(shares) < 0.999
    assert CliRunner().invoke(app, [*ask, found[1]]).exit_code == 0


def test_analyze_prints_groups_and_plan(pipeline_folder: Path, tmp_path: Path, gfprune: Gfprune) -> None:
    page = tmp_path / "page.html"
    done = gfprune("analyze", "--model", pipeline_folder, "--sparsity", "0.3", "--sparsity", "0.5", "--json",
                   "--html", page)  # fmt: skip
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert [plan["sparsity"] for plan in document["plan"]] == [0.3, 0.5]
    for plan in document["plan"]:
        for key in ("params", "macs"):
            assert plan["removed"][key] == 1 - plan[key] / document[key]
        assert plan["achieved"] == min(plan["removed"].values()) >= plan["sparsity"]
    for group in document["groups"]:
        assert group.keys() >= {"name", "channels", "params", "macs", "members"}
    assert page.read_text().lstrip().lower().startswith("<!doctype html")
    again = gfprune("analyze", "--model", pipeline_folder, "--html", page)
    assert again.returncode == 2
    assert "--force" in again.stderr


def test_analyze_needs_no_weights(pipeline_folder: Path, tmp_path: Path, gfprune: Gfprune) -> None:
    folder = tmp_path / "model"
    shutil.copytree(pipeline_folder, folder)
    (folder / WEIGHTS).unlink()
    done = gfprune("analyze", "--model", folder, "--sparsity", "0.5")
    assert done.returncode == 0, done.stderr
    assert "conv_in" in done.stdout


def test_analyze_measures_sensitivity(smallest_folder: Path, gfprune: Gfprune) -> None:
    done = gfprune("analyze", "--model", smallest_folder, "--sensitivity", "--json", "--quiet")
    assert done.returncode == 0, done.stderr
    rises = [group["sensitivity"] for group in json.loads(done.stdout)["groups"]]
    assert all(isinstance(rise, float) for rise in rises)
    assert any(rise != 0 for rise in rises)


def test_help_names_every_recipe_option_and_imports_no_torch() -> None:
    shown = CliRunner().invoke(app, ["prune", "--help"], terminal_width=200).output
    for name in option_names(PruneRecipe):
        assert "--" + name.replace("_", "-") in shown
    script = (
        "import sys; from typer.testing import CliRunner; from gfprune_cli.cli.main import app\n"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0\n"
        "assert not {'torch', 'diffusers', 'pydantic', 'rich.progress', 'yaml'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def damaged(name: str, source: Path, folder: Path) -> list[object]:
    """Arguments of a run that must fail, from a copy of the tiny pipeline made wrong in one way."""
    model = folder / "model"
    shutil.copytree(source, model)
    weights, config = model / WEIGHTS, model / "unet" / "config.json"
    if name == "missing path":
        return ["--model", folder / "nowhere"]
    if name == "no checkpoint":
        (folder / "empty").mkdir()
        return ["--model", folder / "empty"]
    if name == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    if name == "corrupt header":
        weights.write_bytes(struct.pack("<Q", 1 << 40) + weights.read_bytes()[8:])
    if name == "pickle":
        weights.rename(weights.with_name("diffusion_pytorch_model.bin"))
    if name == "pickle under another name":
        weights.write_bytes(b"\x80\x04" + b"cos\nsystem\n" * 20)
    if name == "shape":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"block_out_channels": [16, 64]}))
    if name == "not finite":
        data = bytearray(weights.read_bytes())
        data[-4:] = struct.pack("<f", float("nan"))
        weights.write_bytes(bytes(data))
    if name == "class":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"_class_name": "Evil"}))
    if name == "sparsity":
        return ["--model", model, "--sparsity", "1.5"]
    if name == "sparsity not a number":
        return ["--model", model, "--sparsity", "half"]
    if name == "unreachable":
        return ["--model", model, "--sparsity", "0.999"]
    if name == "existing output":
        (folder / "out").mkdir()
        (folder / "out" / "mine.txt").write_text("keep me")
    if name in ("unknown key", "not yaml"):
        recipe = folder / "recipe.yaml"
        recipe.write_text("sparsty: 0.5" if name == "unknown key" else "a: [1")
        return ["--model", model, "--config", recipe]
    if name == "empty data":
        (folder / "images").mkdir()
        return ["--model", model, "--data", folder / "images"]
    if name == "unreadable data":
        (folder / "images").mkdir()
        (folder / "images" / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(20))
        return ["--model", model, "--data", folder / "images"]
    if name == "object array":
        np.savez(folder / "x.npz", x=np.array([{}], dtype=object))
        return ["--model", model, "--data", folder / "x.npz"]
    if name == "device":
        return ["--model", model, "--device", "quantum"]
    return ["--model", model]


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("missing path", 2, "no such folder"),
        ("no checkpoint", 1, "empty"),
        ("truncated", 1, "safetensors"),
        ("corrupt header", 1, "safetensors"),
        ("pickle", 1, "safe_serialization"),
        ("pickle under another name", 1, "safetensors"),
        ("shape", 1, "unet"),
        ("not finite", 1, "finite"),
        ("class", 1, "Evil"),
        ("sparsity", 2, "--sparsity"),
        ("sparsity not a number", 2, "--sparsity"),
        ("unreachable", 2, "nearest"),
        ("existing output", 2, "--force"),
        ("unknown key", 2, "sparsty"),
        ("not yaml", 2, "YAML"),
        ("empty data", 2, "images"),
        ("unreadable data", 1, "a.png"),
        ("object array", 2, "x.npz"),
        ("device", 2, "--device"),
    ],
)
def test_bad_input_gets_one_line_and_writes_nothing(
    pipeline_folder: Path, tmp_path: Path, gfprune: Gfprune, name: str, code: int, words: str
) -> None:
    arguments = damaged(name, pipeline_folder, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    done = gfprune("prune", "--quiet", "--out", tmp_path / "out", *quick_flags(), *arguments)
    assert done.returncode in (1, 2), done.stderr
    assert done.stdout == ""
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(tmp_path.rglob("*")) == before
    assert done.returncode == code, done.stderr
    if name != "sparsity not a number":  # Typer's own usage error
        assert len(done.stderr.strip().splitlines()) == 1


def test_no_network_is_one_line(tmp_path: Path, gfprune: Gfprune) -> None:
    done = gfprune(
        "prune", "--quiet", "--model", "someone/model", cwd=tmp_path, HF_HUB_OFFLINE="0",
        HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path / "home"),
    )  # fmt: skip
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "model-taylor-both50").exists()


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 8 TB")]
)
def test_want_of_memory_says_what_to_ask_for(error: Exception) -> None:
    assert one_line(error).startswith("out of memory: ask for")


DDPM_CIFAR10: dict[str, Any] = dict(
    sample_size=32,
    block_out_channels=(128, 256, 256, 256),
    down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=None,
    norm_eps=1e-6,
    freq_shift=1,
    flip_sin_to_cos=False,
    downsample_padding=0,
)


def test_the_ddpm_cifar10_network_is_planned_at_its_size(tmp_path: Path) -> None:
    """35.7 M parameters, from the configuration."""
    config = DDPM_CIFAR10 | {"_class_name": "UNet2DModel"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = gfprune_cli.analyze(str(tmp_path), sparsity=[0.44])
    assert found.params == 35_746_307
    assert abs(found.plan[0].achieved - 0.44) <= 0.01


@pytest.mark.thorough  # the demo is pruned, a flat repository too
@pytest.mark.parametrize("narrower", [4, 1])
def test_the_ddpm_cifar10_architecture(tmp_path: Path, narrower: int) -> None:
    """In a repository without a folder for each component, at its own widths too."""
    import torch
    from diffusers import DDPMScheduler, UNet2DModel

    torch.manual_seed(0)
    widths = tuple(width // narrower for width in DDPM_CIFAR10["block_out_channels"])
    unet = UNet2DModel(**DDPM_CIFAR10 | {"block_out_channels": widths})
    flat(tmp_path / "model", unet, DDPMScheduler())
    result = gfprune_cli.prune(
        str(tmp_path / "model"), sparsity=0.44, one_shot=True, images=4, sample_steps=1, draws=4, recover=0,
        refit=False, out=tmp_path / "out",
    )  # fmt: skip
    assert result.params["before"] == sum(parameter.numel() for parameter in unet.parameters())
    assert abs(result.sparsity["achieved"] - 0.44) <= 0.01
    masked, removed = result.loss["masked"], result.loss["removed"]
    assert masked is not None
    assert removed is not None
    assert abs(removed - masked) <= 0.02 * masked


def flat(folder: Path, unet: Any, scheduler: Any) -> None:
    """A pipeline as the first ones on the Hub: its network beside the index, not in a folder of its own."""
    unet.save_pretrained(folder)
    scheduler.save_pretrained(folder)
    index = {
        "_class_name": "DDPMPipeline",
        "scheduler": ["diffusers", "DDPMScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))


@pytest.mark.slow
def test_a_flat_repository_of_the_hub(tmp_path: Path, gfprune: Gfprune) -> None:
    """Pinned revision: downloaded, pruned, recorded; the card says what it came from."""
    from diffusers import DDPMScheduler, UNet2DModel
    from hub_server import COMMIT, hub_server

    folder = tmp_path / "repository"
    flat(folder, UNet2DModel(**SMALLEST), DDPMScheduler())
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    with hub_server({"google/ddpm-cifar10-32": folder}) as hub:
        done = gfprune(
            "prune", "--model", "google/ddpm-cifar10-32", "--revision", "main", "--sparsity", "0.44",
            "--json", "--one-shot", "--images", "4", "--sample-steps", "1", "--draws", "4", "--recover", "0",
            "--no-refit", "--out", tmp_path / "out",
            HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "hf"), HF_HUB_OFFLINE="0",
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model"] == "google/ddpm-cifar10-32"
    record = json.loads((tmp_path / "out" / "gfprune.json").read_text())
    assert record["source"]["commit"] == COMMIT
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model: google/ddpm-cifar10-32" in card
    assert "license: apache-2.0" in card


def test_the_library_leaves_the_environment_alone(server: Server) -> None:
    """Only the command line forbids remote code for its process; a user's own process may load the result."""
    script = (
        "import os, sys\n"
        "for name in [name for name in sys.modules if name.partition('.')[0] == 'gfprune_cli']:\n"
        "    del sys.modules[name]\n"
        "del os.environ['DIFFUSERS_DISABLE_REMOTE_CODE']\n"
        "import gfprune_cli; gfprune_cli.load; assert 'DIFFUSERS_DISABLE_REMOTE_CODE' not in os.environ"
    )
    done = server.run(script=script, environment={"DIFFUSERS_DISABLE_REMOTE_CODE": "1"})
    assert done.code == 0, done.stderr


def test_a_signal_within_a_long_operation_stops_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling or tracing reports nothing for minutes; the run ends all the same, with the signal's code."""
    from gfprune_cli.cli import session, signals

    monkeypatch.setattr(signals, "PATIENCE", 0.01)
    handlers = {
        number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)
    }

    def wait_for_ever() -> None:
        with session.Session(quiet=True, debug=False, json=False, offline=False):
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()

    try:
        with pytest.raises(SystemExit) as stop:
            wait_for_ever()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert stop.value.code == 143
