"""Every family of pipelines goes the whole way: analyze, prune, finetune, eval, export, back to diffusers.

The table in docs/support.md says what ran here; write it anew with

    GFPRUNE_WRITE_SUPPORT=1 python -m pytest tests/commands/test_families.py
"""

import json
import os
import subprocess
import sys
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import CALLS, COMPONENTS, FAMILIES, FREE, digest, sample

import gfprune_cli
from gfprune_cli.pruning.result import PruneResult

pytestmark = pytest.mark.matrix(3)

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "docs" / "support.md"
SPARSITY = 0.3
SMALL: dict[str, Any] = dict(images=4, sample_steps=2, batch=2)
PRUNE: dict[str, Any] = dict(images=4, sample_steps=2, draws=4, iterations=1, recover=1)
# pixels of drawn images where the pipeline's own default is large
SIZES = {family: f"{call['height']}x{call['width']}" for family, call in CALLS.items() if "height" in call}
RUNS = [(family, COMPONENTS[family]) for family in FAMILIES] + [("stable-diffusion", "vae"), ("ldm", "vqvae")]
# a tiny network is mostly what cannot go: embeddings and the residual stream
REACHABLE = {("dit", "transformer"): 0.15, ("stable-diffusion", "vae"): 0.25}
JOURNEYS: list["Journey"] = []  # that have pruned something
SEEN: dict[tuple[str, str], dict[str, str]] = {}  # (family, component) -> column -> what was seen


class Journey:
    """One component of one family, pruned once, for all the tests of this module."""

    def __init__(self, family: str, component: str, folder: Path) -> None:
        self.family, self.component, self.folder = family, component, folder
        self.dense = FAMILIES[family](folder / "dense")
        self.settings: dict[str, Any] = {"component": component}
        if family in SIZES:
            self.settings["size"] = SIZES[family]
        if "num_frames" in CALLS[family]:
            self.settings["frames"] = CALLS[family]["num_frames"]
        SEEN.setdefault((family, component), {})
        JOURNEYS.append(self)

    @property
    def sparsity(self) -> float:
        return REACHABLE.get((self.family, self.component), SPARSITY)

    def note(self, column: str, text: str) -> None:
        SEEN[self.family, self.component][column] = text

    @cached_property
    def pruned(self) -> PruneResult:
        return gfprune_cli.prune(
            str(self.dense), out=self.folder / "pruned", sparsity=self.sparsity, **PRUNE | self.settings
        )

    @property
    def output(self) -> Path:
        assert self.pruned.output is not None
        return Path(self.pruned.output)

    def load(self, path: Path) -> torch.nn.Module:
        return gfprune_cli.load(str(path), component=self.component)


@pytest.fixture(scope="module", params=RUNS, ids=lambda run: "-".join(run))
def journey(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Journey:
    family, component = request.param
    return Journey(family, component, tmp_path_factory.mktemp(f"{family}-{component}"))


def test_analyze_finds_groups_and_plans(journey: Journey) -> None:
    found = gfprune_cli.analyze(str(journey.dense), sparsity=[journey.sparsity], component=journey.component)
    assert found.params == sum(parameter.numel() for parameter in journey.load(journey.dense).parameters())
    assert found.macs > 0
    assert abs(found.plan[0].achieved - journey.sparsity) <= 0.01
    journey.note("class", f"`{found.class_name}`")
    journey.note("groups", str(len(found.groups)))


def test_prune_reaches_the_sparsity_and_removal_changes_nothing(journey: Journey) -> None:
    result = journey.pruned
    assert abs(result.sparsity["achieved"] - journey.sparsity) <= 0.01
    left = sum(parameter.numel() for parameter in journey.load(journey.output).parameters())
    assert left == result.params["after"] < result.params["before"]
    masked, removed = result.loss["masked"], result.loss["removed"]
    assert masked is not None
    assert removed is not None
    assert abs(masked - removed) <= 1e-4 * abs(masked)
    journey.note("prune", f"{journey.sparsity:.0%}")


def test_finetune_trains_the_pruned_component(journey: Journey) -> None:
    done = gfprune_cli.finetune(
        journey.output, out=journey.folder / "finetuned", steps=2, sample_every=0, **SMALL | journey.settings
    )
    before, after = journey.load(journey.output), journey.load(Path(str(done.output)))
    moved = [
        name
        for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True)
        if not torch.equal(old, new)
    ]
    assert len(moved) > 5, "weights were trained"
    assert done.loss["after"] is not None
    journey.note("finetune", "yes")


def test_eval_compares_with_the_dense_model(journey: Journey) -> None:
    document = gfprune_cli.evaluate(
        str(journey.output),
        samples=2,
        steps=2,
        batch=2,
        latency_batches="1",
        **journey.settings,
    ).document()
    metrics = document["metrics"]
    assert metrics["loss"]["value"] > 0
    assert any(name in metrics for name in ("ssim", "psnr"))
    assert document["latency"][0]["ms"] > 0
    journey.note("eval", ", ".join(sorted(metrics)))


def test_export_agrees_with_the_checkpoint(journey: Journey, thorough: bool) -> None:
    """In ONNX with --thorough: it is made of the program of torch-export, and takes twice as long."""
    form = "onnx" if thorough and journey.family != "ltx" else "torch-export"  # 7392 tokens take minutes
    done = gfprune_cli.export(
        str(journey.output), out=journey.folder / "graph", format=form, component=journey.component
    ).document()
    assert done["parity"]["max_abs"] <= done["parity"]["tolerance"]
    inputs = list(done["inputs"].values())
    assert journey.component in ("vae", "vqvae") or inputs[0]["shape"] == FREE[journey.family]
    if "encoder_hidden_states" in done["inputs"]:
        assert done["inputs"]["encoder_hidden_states"]["shape"][:2] == ["batch", "text"]
    journey.note("export", form)


PLAIN = """
import json, sys
sys.modules["gfprune_cli"] = None  # what follows works without it
sys.path.insert(0, sys.argv[1])
from pipelines import digest, sample
for family, path, kind in json.load(sys.stdin):
    print(digest(sample(family, path, output_type=kind, loading={"trust_remote_code": True})))
"""


def test_pruned_pipelines_run_in_plain_diffusers_as_in_gfprune() -> None:
    """Without gfprune: the same samples, bit for bit, as with what `gfprune_cli.load` returns."""
    kinds = ["np" if journey.component in ("vae", "vqvae") else "latent" for journey in JOURNEYS]
    tasks = [
        (journey.family, str(journey.output), kind) for journey, kind in zip(JOURNEYS, kinds, strict=True)
    ]
    environment = {key: value for key, value in os.environ.items() if key != "DIFFUSERS_DISABLE_REMOTE_CODE"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PLAIN, str(ROOT / "tests" / "support")],
        input=json.dumps(tasks),
        capture_output=True,
        text=True,
        env=environment,
        timeout=550,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for journey, kind, found in zip(JOURNEYS, kinds, done.stdout.split(), strict=True):
        loaded = {journey.component: journey.load(journey.output)}
        expected = digest(sample(journey.family, journey.dense, output_type=kind, components=loaded))
        assert found == expected, journey.family
        journey.note("diffusers", "yes")


COLUMNS = ("class", "groups", "prune", "finetune", "eval", "export", "diffusers")
HEADING = "|---|---|---|---|---|---|---|---|---|\n"


def test_the_support_table_says_what_ran() -> None:
    if set(SEEN) != set(RUNS) or any(set(COLUMNS) - set(row) for row in SEEN.values()):
        pytest.skip("only a part ran")
    rows = [
        " | ".join([f"| {family}", component, *(row[column] for column in COLUMNS)]) + " |\n"
        for (family, component), row in SEEN.items()
    ]
    before, _, rest = TABLE.read_text(encoding="utf-8").partition(HEADING)
    table, _, after = rest.partition("\n\n")
    if os.environ.get("GFPRUNE_WRITE_SUPPORT"):
        TABLE.write_text(f"{before}{HEADING}{''.join(rows)}\n{after}", encoding="utf-8")
    else:
        assert table + "\n" == "".join(rows)
