"""A pruned pipeline in the programs that people use it with: plain diffusers, without gfprune."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pipelines import stable_diffusion_1

import gfprune_cli
from gfprune_cli.checkpoint import writer

CALLS = Path(__file__).parents[1] / "support" / "client_calls.py"


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion of uneven widths, its weights in several files."""
    folder = tmp_path_factory.mktemp("clients")
    settings = dict(one_shot=True, refit=False, recover=0, images=4, sample_steps=2, draws=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "SHARD_BYTES", 100_000)
        gfprune_cli.prune(
            str(stable_diffusion_1(folder / "dense")), sparsity=0.4, out=folder / "pruned", **settings
        )
    return folder / "pruned"


@pytest.fixture(scope="module")
def said(pruned: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Call -> "ok" or the error, from one process that knows diffusers only."""
    scratch = tmp_path_factory.mktemp("elsewhere")
    environment = {k: v for k, v in os.environ.items() if k != "DIFFUSERS_DISABLE_REMOTE_CODE"}
    environment["HF_MODULES_CACHE"] = str(scratch / "modules")
    arguments = [sys.executable, CALLS, pruned, scratch]
    done = subprocess.run(
        [*map(str, arguments)], capture_output=True, text=True, env=environment, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    "call",
    [
        "AutoModel, subfolder",
        "AutoModel, another subfolder",
        "pipeline with a network",
        "pipeline without one",
        "pickle",
        "pickle of the second load",
        "torch.save",
        "spawn",
        "from_pipe",
        "from_pipe, automatic",
        "training script",
        "scales by block",
    ],
)
def test_what_works_on_the_dense_model_works_on_the_pruned_one(said: dict[str, str], call: str) -> None:
    assert said[call] == "ok"


@pytest.mark.slow
@pytest.mark.parametrize("call", ["stock class", "stock class, mismatches ignored"])
def test_the_stock_class_stops_and_says_what_to_call(said: dict[str, str], call: str) -> None:
    assert "pruned, and its stock class cannot hold it: call AutoModel.from_pretrained" in said[call]


def test_large_weights_are_written_in_shards(pruned: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """By `prune` and by `finetune`, in files as diffusers names them."""
    monkeypatch.setattr(writer, "SHARD_BYTES", 100_000)
    gfprune_cli.finetune(pruned, steps=1, images=4, sample_steps=2, batch=2, out=tmp_path / "tuned")
    for folder in (pruned / "unet", tmp_path / "tuned" / "unet"):
        index = json.loads((folder / "diffusion_pytorch_model.safetensors.index.json").read_text())
        shards = sorted(folder.glob("*.safetensors"))
        assert len(shards) > 1
        assert {path.name for path in shards} == set(index["weight_map"].values())
        assert {path.name for path in shards} == {
            f"diffusion_pytorch_model-{number:05}-of-{len(shards):05}.safetensors"
            for number in range(1, len(shards) + 1)
        }
    tuned, before = gfprune_cli.load(tmp_path / "tuned"), gfprune_cli.load(pruned)
    assert tuned.state_dict().keys() == before.state_dict().keys()
