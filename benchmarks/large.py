"""What a prune run of a large network takes: planned and measured memory, bytes per parameter, seconds.

    python benchmarks/large.py                       # about 25 minutes; needs 10 GB
    python benchmarks/large.py --networks dit        # one of them
    python benchmarks/large.py --networks            # plans alone, seconds
    python benchmarks/large.py --networks sdxl --device cuda    # large-cuda.md: on a card, and finetune

Writes `large.md` into docs/benchmarks: what the memory plan asks for on real networks, and what runs took;
parts add up, in a file beside it. Of the latter weights are random, architectures real, samples small, since
what is asked is how memory follows the weights. Every run is told how much is free, and takes pieces that
fit in it.
"""

import argparse
import json
import os
import shlex
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel, FluxTransformer2DModel, UNet2DConditionModel
from own_process import in_a_process
from provenance import PAGES, commit, flags, table, write_page

from gfprune_cli.inputs.examples import example_inputs
from gfprune_cli.pruning.memory import FLOAT, Phase, one_pass
from gfprune_cli.pruning.phases import phases_of
from gfprune_cli.pruning.verify import small_share
from gfprune_cli.recipes.prune import PruneRecipe
from gfprune_cli.structure.cost import CostModel
from gfprune_cli.structure.graph import discover

GB = 1e9
SETTINGS: dict[str, Any] = dict(sparsity=0.5, images=4, sample_steps=1, draws=8, recover=2)
FINETUNE: dict[str, Any] = dict(steps=20, lora=16, batch=4, micro_batch=1, images=8, sample_steps=1)
MEMORY = """
import threading, time, torch
def now():
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    return status("RssAnon")  # pages of mapped files can go whenever others want the room
most = [now()]
def watch():
    while True:
        most[0] = max(most[0], now())
        time.sleep(0.01)
def peak():
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else most[0]
threading.Thread(target=watch, daemon=True).start()
"""
MEASURE = """
import diffusers
import gfprune_cli, gfprune_cli.pruning.job as job
asked, free = json.loads(sys.argv[1]), float(sys.argv[2])
job.available = lambda device: int(free)
if torch.cuda.is_available():  # cuDNN would take what is there for its workspaces
    torch.cuda.set_per_process_memory_fraction(min(1.0, free / torch.cuda.mem_get_info()[1]))
for function in (job.PruneJob.loss, job.PruneJob.losses):  # of memory they take no less, and much less time
    function.__defaults__ = (16,)
plan_memory, plans = job.PruneJob.plan_memory, []
job.PruneJob.plan_memory = lambda run, one: (plan_memory(run, one), plans.append(run.memory))
start = now()
seen = []
def follow(event):
    if event.phase not in seen[-1:]:
        seen.append(event.phase)
        print(f"{time.perf_counter():.0f} s, {peak() / 1e9:.2f} GB: {event.phase}", file=sys.stderr)
result = gfprune_cli.prune(progress=follow, **asked)
plan = plans[-1]
planned = {phase.name: phase.need(plan.weights, plan.at_once(phase.name)) for phase in plan.phases}
seconds, params = result.seconds_by_phase, result.params["before"]
print(json.dumps(dict(peak=peak() - start, planned=planned, seconds=seconds, params=params)))
"""
MEASURE_FINETUNE = """
import diffusers, gfprune_cli
begin, start = time.perf_counter(), now()
gfprune_cli.finetune(**json.loads(sys.argv[1]))
print(json.dumps(dict(peak=peak() - start, seconds=time.perf_counter() - begin)))
"""


def stable_diffusion(width: int, size: int) -> Any:
    """The U-Net of Stable Diffusion 1.5, at a part of its width."""
    widths = (width, 2 * width, 4 * width, 4 * width)
    return UNet2DConditionModel(
        sample_size=size, block_out_channels=widths, cross_attention_dim=768, attention_head_dim=8
    )


def dit(layers: int, size: int) -> Any:
    """DiT-XL/2 of fewer or more layers."""
    return DiTTransformer2DModel(
        num_layers=layers, sample_size=size, num_attention_heads=16, attention_head_dim=72
    )


REAL: dict[str, tuple[Any, dict[str, Any]]] = {
    "Stable Diffusion 1.5, 512 px": (
        UNet2DConditionModel, dict(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    ),
    "Stable Diffusion XL, 1024 px": (
        UNet2DConditionModel,
        dict(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=(5, 10, 20),
            transformer_layers_per_block=(1, 2, 10),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        ),
    ),
    "DiT-XL/2, 256 px": (DiTTransformer2DModel, dict(num_layers=28, sample_size=32)),
    "FLUX.1-dev, 1024 px": (FluxTransformer2DModel, dict(guidance_embeds=True)),
}  # fmt: skip
FOLDED = (DiTTransformer2DModel, FluxTransformer2DModel)  # by default, as transformers are
PLANS: dict[str, dict[str, Any]] = {
    "default": {},
    "`--recover 0`": dict(recover=0),
    "`--one-shot --no-refit --recover 0`": dict(one_shot=True, refit=False, recover=0),
}


@cache
def plan_table() -> str:
    """Least memory of real networks, by the plan: one sample at a time, the dense network elsewhere."""
    rows = []
    for name, (kind, config) in REAL.items():
        with torch.device("meta"):
            network = kind(**config)
        params = sum(parameter.numel() for parameter in network.parameters())
        matrices = sum(parameter.numel() for parameter in network.parameters() if parameter.ndim > 1)
        one = one_pass(network, example_inputs(network))
        groups, trace = discover(network)
        narrow = small_share(groups, CostModel(network, groups, trace))
        kept = f"{FLOAT * one.kept / GB:.1f}"
        for words, stored in (("float32", 1.0), ("half", 1 - matrices / params / 2)):
            cells = []
            for settings in PLANS.values():
                recipe = PruneRecipe(sparsity=0.5, **settings)
                folds = kind in FOLDED
                phases = phases_of(recipe, one, offload=True, narrow=narrow, stored=stored, folds=folds)
                cells.append(worst_of(phases, params))
            rows.append([name, f"{params / 1e6:,.0f} M", kept, words, *cells])
    head = ("network", "parameters", "activations of a sample, GB", "stored in", *PLANS)
    return "\n".join(table(head, rows))


def worst_of(phases: Sequence[Sequence[Phase]], params: int) -> str:
    """What the largest of the phases needs at least, and its bytes per parameter without samples."""
    last = [forms[-1] for forms in phases]
    worst = max(last, key=lambda phase: phase.need(params * FLOAT, phase.least))
    need = worst.need(params * FLOAT, worst.least) / GB
    return f"{need:.1f} GB ({worst.name}; {FLOAT * worst.copies:.1f} bytes per parameter)"


@dataclass(frozen=True)
class Subject:
    """A network, and the gigabytes that its run is told are free."""

    words: str
    make: Callable[[], Any]
    free: float
    dtype: torch.dtype = torch.float32


SUBJECTS = {
    "half": Subject("SD 1.5 at half of its width, 16 x 16 latents", lambda: stable_diffusion(160, 16), 5),
    "dit": Subject("DiT-XL/2, 16 x 16 latents", lambda: dit(28, 16), 10),
    "dit-half": Subject(
        "DiT-XL/2, 16 x 16 latents, stored in bf16", lambda: dit(28, 16), 4.2, torch.bfloat16
    ),
    "sd15": Subject("SD 1.5, 16 x 16 latents", lambda: stable_diffusion(320, 16), 10),
    "sdxl-16": Subject(
        "SDXL, 16 x 16 latents, stored in bf16",
        lambda: real("Stable Diffusion XL, 1024 px", sample_size=16),
        16,
        torch.bfloat16,
    ),
    "sdxl": Subject(
        "SDXL, 128 x 128 latents, stored in bf16",
        lambda: real("Stable Diffusion XL, 1024 px"),
        80,
        torch.bfloat16,
    ),
}
DEFAULT = ("half", "dit", "sd15")


def real(name: str, **changes: Any) -> Any:
    kind, config = REAL[name]
    return kind(**config | changes)


def measured(
    subject: Subject, root: Path, seed: int, device: str, finetune: bool
) -> Iterator[dict[str, Any]]:
    """A prune run in a process of its own; then with a finetuning of what it wrote, if that is wanted."""
    torch.manual_seed(seed)
    model, out, kept = root / "dense", root / "out", root / "cache"
    with torch.device(device):
        subject.make().to(subject.dtype).save_pretrained(model / "denoiser")
    DDIMScheduler().save_pretrained(model / "scheduler")
    common = dict(seed=seed, device=device, force=True)
    asked = SETTINGS | common | dict(model=str(model / "denoiser"), out=str(out))
    found: dict[str, Any] = in_a_process(MEMORY + MEASURE, json.dumps(asked), subject.free * GB, cache=kept)
    yield found
    if finetune:
        made = dict(model=str(out), out=str(root / "tuned"), save_every=0, sample_every=0)
        asked = FINETUNE | common | made
        tuned = in_a_process(MEMORY + MEASURE_FINETUNE, json.dumps(asked), cache=kept)
        yield found | {"finetune": tuned}


def rows_table(rows: Sequence[tuple[Subject, dict[str, Any]]]) -> str:
    head = (
        *("network", "parameters", "free, GB", "planned peak, GB", "measured, GB", "planned for measured"),
        *("bytes per parameter", "scoring, s", "refit, s", "all, s", "commit"),
    )
    cells = []
    for subject, found in rows:
        where, planned = max(found["planned"].items(), key=lambda item: item[1])
        seconds = found["seconds"]
        peak, params = found["peak"], found["params"]
        cells.append(
            [
                subject.words,
                f"{params / 1e6:.0f} M",
                f"{subject.free:g}",
                f"{planned / GB:.2f} ({where})",
                f"{peak / GB:.2f}",
                f"{planned / peak:.2f}",
                f"{peak / params:.1f}",
                f"{seconds.get('scoring', 0):.0f}",
                f"{seconds.get('refit', 0):.0f}",
                f"{sum(seconds.values()):.0f}",
                found["commit"],
            ]
        )
    return "\n".join(table(head, cells))


def finetune_text(rows: Sequence[tuple[Subject, dict[str, Any]]]) -> str:
    """What finetuning took, where it was run."""
    tuned = [
        [subject.words, f"{found['finetune']['peak'] / GB:.2f}", f"{found['finetune']['seconds']:.0f}"]
        for subject, found in rows
        if "finetune" in found
    ]
    if not tuned:
        return ""
    said = f"\n`gfprune finetune {flags(FINETUNE)}` of what that wrote, drawing its images included:\n\n"
    return said + "\n".join(table(("network", "peak, GB", "seconds"), tuned)) + "\n"


def main(given: Sequence[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="*", choices=SUBJECTS, default=list(DEFAULT))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=PAGES, help="folder")
    options = parser.parse_args(given)
    torch.set_num_threads(options.threads)
    made_at = commit()
    options.out.mkdir(parents=True, exist_ok=True)
    kept = options.out / f"large-{options.device}.json"
    rows: dict[str, dict[str, Any]] = json.loads(kept.read_text()) if kept.exists() else {}
    device = options.device
    for name in options.networks:
        subject = SUBJECTS[name]
        with tempfile.TemporaryDirectory() as root:
            for found in measured(subject, Path(root), options.seed, device, finetune=device == "cuda"):
                rows[name] = found | {"commit": made_at}
                kept.write_text(json.dumps(rows))
                written(options, rows)
    return written(options, rows)


def written(options: argparse.Namespace, kept: dict[str, dict[str, Any]]) -> Path:
    """The page: plans, unless it is about a card, and runs."""
    device = options.device
    rows = [(subject, kept[name]) for name, subject in SUBJECTS.items() if name in kept]
    command = shlex.join(["python", "benchmarks/large.py", "--networks", *kept, "--device", device])
    body = ""
    if device == "cpu":
        body += (
            "Least by the plan, one sample at a time, the dense network on disk; beside samples and what the "
            f"matrices of one layer take, the bytes of weights for each parameter:\n\n{plan_table()}\n\n"
        )
    if rows:
        body += (
            f"Runs: `gfprune prune {flags(SETTINGS)}`. Peaks are above what the imports take, "
            "without mapped files; reported losses are of 16 draws instead of 128.\n\n"
            f"{rows_table(rows)}\n{finetune_text(rows)}"
        )
    page = "large.md" if device == "cpu" else "large-cuda.md"
    return write_page(options.out / page, "Memory of large networks", command, options.seed, body)


if __name__ == "__main__":
    print(main())
