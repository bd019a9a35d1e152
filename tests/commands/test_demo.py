"""The demo checkpoint and the documents: what users see first has to be true."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SMALLER_DEMO, Gfprune, Shell, examples
from forked import Server
from PIL import Image

import gfprune_cli
from gfprune_cli.checkpoint.source import DEMO

ROOT = Path(__file__).parents[2]
LONG: dict[str, Any] = dict(iterations=2, images=16, sample_steps=4)
SHORT: dict[str, Any] = dict(one_shot=True, refit=False, images=4, sample_steps=1, draws=4)


def test_the_demo_is_a_trained_model_of_the_promised_size() -> None:
    """At least 1.5 M parameters, at most 8 MB with its images and notices, and far better than untrained."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from yardstick import demo, losses

    model = gfprune_cli.load("demo")
    assert sum(parameter.numel() for parameter in model.parameters()) >= 1_500_000
    assert sum(path.stat().st_size for path in DEMO.rglob("*") if path.is_file()) <= 8_000_000
    assert "Apache" in (DEMO / "NOTICE").read_text()
    with np.load(DEMO / "images.npz") as images:
        assert images["x"].shape == (413, 32, 32, 3)
        assert images["held_out"].shape == (46, 32, 32, 3)
    assert losses(demo(), model, 128)[0] < 0.045  # predicting no noise at all scores 1


@pytest.mark.thorough  # every run checks it, and tiny networks have tests
@pytest.mark.slow
@pytest.mark.matrix(3)
@pytest.mark.parametrize("budget", ["both", "params", "macs"])
def test_removal_changes_nothing_on_the_demo(tmp_path: Path, budget: Any, thorough: bool) -> None:
    """|loss removed - loss masked| is at most 2 % of the masked loss; the budget is met within one point."""
    result = gfprune_cli.prune(
        "demo", sparsity=0.5, budget=budget, recover=0, out=tmp_path / "out",
        **(LONG if thorough else SHORT),
    )  # fmt: skip
    masked, removed = result.loss["masked"], result.loss["removed"]
    assert masked is not None
    assert removed is not None
    assert abs(removed - masked) <= 0.02 * masked
    assert abs(result.sparsity["achieved"] - 0.5) <= 0.01


@pytest.mark.matrix(4)
@pytest.mark.parametrize("budget", ["both", "params", "macs"])
@pytest.mark.parametrize("sparsity", [0.2, 0.3, 0.44, 0.5, 0.7])
def test_every_budget_is_met_within_one_point_on_the_demo(sparsity: float, budget: str) -> None:
    plan = gfprune_cli.analyze("demo", sparsity=[sparsity], budget=budget).plan[0]  # type: ignore[arg-type]
    assert abs(plan.achieved - sparsity) <= 0.01
    assert plan.achieved == (min(plan.removed.values()) if budget == "both" else plan.removed[budget])


@pytest.mark.thorough  # structure/test_traced.py counts real configurations
@pytest.mark.slow
@pytest.mark.matrix(2)
@pytest.mark.parametrize(
    ("layers", "parameters", "least"), [([1, 1, 2], 849_157_764, 80), ([1, 2, 10], 2_567_463_684, 200)]
)
def test_an_sdxl_size_network_is_analyzed_from_its_configuration(
    layers: list[int], parameters: int, least: int, server: Server, tmp_path: Path
) -> None:
    """SDXL, and as wide with fewer blocks: no weights, less memory than they would take."""
    config = {
        "_class_name": "UNet2DConditionModel",
        "sample_size": 128,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "block_out_channels": [320, 640, 1280],
        "transformer_layers_per_block": layers,
        "attention_head_dim": [5, 10, 20],
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    script = (
        "import gfprune_cli\n"
        f"found = gfprune_cli.analyze({str(tmp_path)!r}, sparsity=[0.3])\n"
        "status = open('/proc/self/status').read()\n"
        "peak = int(status.split('VmHWM:')[1].split()[0]) * 1024\n"
        "print(found.params, len(found.groups), peak)"
    )
    done = server.run(script=script)
    assert done.code == 0, done.stderr
    params, groups, peak = map(int, done.stdout.split()[-3:])
    assert params == parameters
    assert groups > least
    assert peak < 2e9


@pytest.mark.slow
def test_the_pipeline_of_the_readme_runs_as_written(tmp_path: Path, shell: Shell) -> None:
    script = next(block for block in examples(ROOT / "README.md", "sh") if "OUT=$(gfprune prune" in block)
    shell(["bash", "-euc", script.replace(". .venv/bin/activate\n", "")])
    assert np.asarray(Image.open(tmp_path / "demo-sample.png")).std() > 10  # not one colour
    assert (tmp_path / "demo-analysis.html").exists()


@pytest.mark.slow
def test_the_python_example_of_the_readme_runs_as_written(
    server: Server, pipeline_folder: Path, thorough: bool, tmp_path: Path
) -> None:
    smaller = {} if thorough else {SMALLER_DEMO: str(pipeline_folder)}  # large enough for SSIM
    example = next(block for block in examples(ROOT / "README.md", "python") if "gfprune.analyze(" in block)
    done = server.run(script=example, folder=str(tmp_path), constants=smaller)
    assert done.code == 0, done.stderr
    assert "channel groups" in done.stdout


def test_links_in_the_documents_lead_somewhere() -> None:
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_cli_reads_the_demo(gfprune: Gfprune) -> None:
    done = gfprune("prune", "--model", "demo", "--sparsity", "0.5", "--dry-run", "--json", "--quiet")
    assert json.loads(done.stdout)["params"]["before"] == 1_740_323
