"""ControlNets and T2I adapters are pruned through the denoiser that takes what they add."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ONE_SHOT
from image_pipelines import PIPELINES
from test_prune import files

import gfprune_cli
from gfprune_cli.errors import GfpruneError, UsageError
from gfprune_cli.inputs.examples import Sizes, example_inputs
from gfprune_cli.pruning.result import PruneResult
from gfprune_cli.structure.tracing import outputs_of

NAMES = {"controlnet": "controlnet", "t2i-adapter": "adapter"}
SHARE = 0.25
BRIEF: dict[str, Any] = ONE_SHOT | dict(sparsity=SHARE, images=4, refit=True)
SMALL: dict[str, Any] = dict(images=4, sample_steps=1, batch=2, sample_every=0)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adding")


def two(place: Path) -> str:
    """Prompts, fewer than samples: several ask for the same."""
    (place / "prompts.txt").write_text("a red fox\na house\n")
    return str(place / "prompts.txt")


@functools.cache
def pruned(place: Path, family: str) -> tuple[Path, Path, PruneResult]:
    """The dense pipeline, the pruned one and the numbers; made once for all tests of this module."""
    dense, out = PIPELINES[family](place / family), place / f"{family}-out"
    result = gfprune_cli.prune(dense, component=NAMES[family], out=out, prompts=two(place), **BRIEF)
    assert isinstance(result, PruneResult)
    return dense, out, result


@pytest.fixture(params=NAMES)
def case(request: pytest.FixtureRequest, place: Path) -> tuple[str, Path, Path, PruneResult]:
    return (NAMES[request.param], *pruned(place, request.param))


def shapes(network: Any) -> list[tuple[int, ...]]:
    """Of everything that a network returns."""
    inputs = example_inputs(network, Sizes(height=8, width=8))
    return [tuple(output.shape) for output in outputs_of(network, inputs)]


def test_it_is_narrowed_exactly_and_adds_what_it_added(case: tuple[str, Path, Path, PruneResult]) -> None:
    name, dense, out, result = case
    assert 0 <= result.sparsity["achieved"] - SHARE <= 0.04
    assert result.loss["removed"] == pytest.approx(result.loss["masked"], rel=1e-5)
    assert result.loss["recovered"] is not None
    assert result.refit is not None
    before, after = (gfprune_cli.load(folder, component=name) for folder in (dense, out))
    assert sum(parameter.numel() for parameter in after.parameters()) == result.params["after"]
    assert shapes(after) == shapes(before)
    record = json.loads((out / "gfprune.json").read_text())
    assert (record["component"], record["class_name"]) == (name, result.class_name)


def test_the_denoiser_travels_as_it_was(case: tuple[str, Path, Path, PruneResult]) -> None:
    _, dense, out, _ = case
    assert files(out / "unet").items() >= files(dense / "unet").items()


PLAIN = """
import sys
sys.modules["gfprune_cli"] = None
import torch
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
network = getattr(pipeline, sys.argv[2])
print(type(network).__name__, sum(parameter.numel() for parameter in network.parameters()))
picture = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
latents = pipeline("a fox", image=picture, num_inference_steps=2, output_type="latent")[0]
assert latents.isfinite().all()
"""


@pytest.mark.matrix(2)
def test_plain_diffusers_loads_and_runs_it(case: tuple[str, Path, Path, PruneResult]) -> None:
    name, _, out, result = case
    environment = {key: value for key, value in os.environ.items() if key != "DIFFUSERS_DISABLE_REMOTE_CODE"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PLAIN, str(out), name],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == [result.class_name, str(result.params["after"])]


def test_it_is_finetuned_evaluated_and_exported(
    case: tuple[str, Path, Path, PruneResult], place: Path, tmp_path: Path
) -> None:
    """Graphs have one output, and what adds has several: weights are what is exported."""
    name, _, out, result = case
    said: list[Any] = []
    asked = dict(component=name, out=tmp_path / "tuned", data="self", steps=1, **SMALL)
    gfprune_cli.finetune(out, dry_run=True, progress=said.append, **asked)
    assert any("denoiser 0." in str(event.text) for event in said)  # it is held beside both
    tuned = gfprune_cli.finetune(out, **asked)
    assert tuned.loss["after"] is not None
    found = gfprune_cli.evaluate(
        out, component=name, samples=4, steps=1, batch=2, no_latency=True, prompts=two(place)
    )
    assert found is not None
    assert {"loss", "loss_reference", "psnr"} <= found.metrics.keys()
    written = gfprune_cli.export(out, component=name, out=tmp_path / "half", dtype="fp16")
    assert written.parity.max_rel is not None
    with pytest.raises(GfpruneError, match=f"{result.class_name} returns a tensor for each state"):
        gfprune_cli.export(out, component=name, format="onnx", out=tmp_path / "onnx", dry_run=True)


def test_the_denoiser_is_pruned_beside_a_pruned_one(place: Path, tmp_path: Path) -> None:
    """Its conditions are recorded from the pipeline with what was narrowed; the record of both is kept."""
    _, dense, _ = pruned(place, "t2i-adapter")
    brief = BRIEF | dict(recover=0, refit=False)
    result = gfprune_cli.prune(dense, component="unet", out=tmp_path / "both", **brief)
    assert isinstance(result, PruneResult)
    record = json.loads((tmp_path / "both" / "gfprune.json").read_text())
    assert (record["component"], list(record["others"])) == ("unet", ["adapter"])
    index = json.loads((tmp_path / "both" / "model_index.json").read_text())
    assert (index["unet"][1], index["adapter"][1]) == ("PrunedUNet2DConditionModel", "PrunedT2IAdapter")


def test_what_it_hands_over_is_in_no_group(place: Path) -> None:
    dense, _, _ = pruned(place, "controlnet")
    shown: Any = gfprune_cli.analyze(dense, component="controlnet")
    names = [group.name for group in shown.groups]
    assert not any(name.startswith(("controlnet_down_blocks", "controlnet_mid_block")) for name in names)
    assert "down_blocks.0.resnets.0.conv1" in names


def test_what_cannot_be_judged_is_refused_in_one_line(place: Path, tmp_path: Path) -> None:
    dense, _, _ = pruned(place, "controlnet")
    with pytest.raises(GfpruneError, match="is a ControlNetModel alone"):
        gfprune_cli.prune(dense / "controlnet", sparsity=0.2, dry_run=True)
    with pytest.raises(UsageError, match="widths are tied"):
        gfprune_cli.prune(dense, component="controlnet", sparsity=0.2, layout="native", dry_run=True)
    several = json.loads((dense / "model_index.json").read_text())
    several["controlnet"] = ["diffusers", "MultiControlNetModel"]
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text((dense / "unet" / "config.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(several))
    with pytest.raises(UsageError, match="MultiControlNetModel holds several"):
        gfprune_cli.prune(tmp_path, component="controlnet", sparsity=0.2, dry_run=True)


@pytest.mark.thorough  # that of a U-Net goes the whole way, its pass is tested
def test_a_controlnet_of_a_transformer(tmp_path: Path) -> None:
    """Its heads, feed-forward units and modulation; what it is given is recorded with its transformer's."""
    dense = PIPELINES["flux-controlnet"](tmp_path / "flux")
    brief = BRIEF | dict(size="16x16", fold=0.05)
    result = gfprune_cli.prune(dense, component="controlnet", out=tmp_path / "out", **brief)
    assert isinstance(result, PruneResult)
    assert 0 <= result.sparsity["achieved"] - SHARE <= 0.01
    assert result.loss["removed"] == pytest.approx(result.loss["masked"], rel=1e-4)
    narrow: Any = gfprune_cli.load(tmp_path / "out", component="controlnet")
    wide: Any = gfprune_cli.load(dense, component="controlnet")
    for one, other in zip(narrow.controlnet_blocks, wide.controlnet_blocks, strict=True):
        assert one.out_features == other.out_features
    again = gfprune_cli.finetune(
        tmp_path / "out",
        component="controlnet",
        out=tmp_path / "tuned",
        data="self",
        steps=1,
        size="16x16",
        **SMALL,
    )
    assert again.loss["after"] is not None
