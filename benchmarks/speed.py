"""What pruning gains in time, and what it costs: latency beside MACs, scoring, memory, seconds by phase.

    python benchmarks/speed.py            # all tables; --quick: fewer rows and rounds, minutes

Writes `speed.md` and its plots into docs/benchmarks. Latency is that of one-shot prunes of the demo, since it
does not depend on the weights; dense and pruned networks take turns, and the time is that of the process, so
that other work on the machine counts little. Memory and phases come from a fresh process for each row.
"""

import argparse
import json
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from own_process import in_a_process
from provenance import PAGES, header, table
from torch.profiler import ProfilerActivity, profile

import gfprune_cli
from gfprune_cli.checkpoint.reader import inspect, load_model
from gfprune_cli.checkpoint.scheduler import load_scheduler
from gfprune_cli.checkpoint.source import resolve
from gfprune_cli.deploy.onnx import run_onnx
from gfprune_cli.deploy.openvino import run_openvino
from gfprune_cli.deploy.torch_export import run_program
from gfprune_cli.diffusion.draws import Draws
from gfprune_cli.diffusion.schedulers import noising_process
from gfprune_cli.flow.criteria import Evidence, score
from gfprune_cli.flow.energy import gradient
from gfprune_cli.flow.loop import scoring_losses
from gfprune_cli.flow.mask import MaskedModel
from gfprune_cli.progress import silent
from gfprune_cli.pruning.plan import make_plan
from gfprune_cli.recipes.prune import CRITERIA, PruneRecipe

SETTINGS = [(budget, sparsity) for budget in ("both", "macs", "params") for sparsity in (0.44, 0.75)]
WANTED = 0.85  # realised latency gain over MAC gain
ONE_SHOT: dict[str, Any] = dict(one_shot=True, refit=False, recover=0, images=32, sample_steps=4, draws=16)
SMALL_RUN: dict[str, Any] = dict(iterations=3, draws=16, recover=12, images=32, sample_steps=2)
PRODUCTS = ("conv", "gemm", "addmm", "::mm", "bmm", "matmul", "linear", "attention", "scaled_dot_product")
DISPATCH = {  # of each runtime, operators that compute nothing; ONNX Runtime's transposes copy
    "eager": (
        *("empty", "view", "reshape", "as_strided", "transpose"),
        *("resolve", "expand", "unsqueeze", "t", "to"),
    ),
    "onnx": ("reshape", "unsqueeze", "squeeze", "shape", "identity", "flatten", "constant"),
}
MEASURE = """
import gfprune_cli, gfprune_cli.pruning, diffusers
start = status("VmRSS")
result = gfprune_cli.prune(**json.loads(sys.argv[1]))
peak = status("VmHWM") - start
print(json.dumps({"peak": peak, "phases": result.seconds_by_phase, "params": result.params["before"]}))
"""
TIMES = ("MAC gain", "dense, ms", "pruned, ms", "gain [quartiles]", "share")
Call = Callable[[], object]
Kinds = dict[str, float]  # kind of operator -> milliseconds of one evaluation
EXPORTED: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "torch-export": ("model.pt2", run_program),
    "onnx": ("model.onnx", lambda path: run_onnx(path, threads=torch.get_num_threads())),
    "openvino": ("openvino_model.xml", lambda path: run_openvino(path, threads=torch.get_num_threads())),
}


@dataclass(frozen=True)
class Gain:
    """Dense beside pruned at one batch size; times in milliseconds, `speedup` the median of the ratios."""

    runtime: str
    batch: int
    budget: str
    sparsity: float
    mac_ratio: float
    dense: float
    pruned: float
    speedup: float
    low: float
    high: float

    @property
    def share(self) -> float:
        """Realised latency gain over MAC gain."""
        return self.speedup / self.mac_ratio

    @property
    def cells(self) -> list[str]:
        """As in the columns `TIMES` of a table."""
        gain = f"{self.speedup:.2f} [{self.low:.2f}, {self.high:.2f}]"
        numbers = [f"{number:.2f}" for number in (self.mac_ratio, self.dense, self.pruned)]
        return [*numbers, gain, f"{self.share:.2f}"]


@dataclass(frozen=True)
class Limit:
    """What holds a gain back, by a profile: its share if products took what MACs promise, what they took of
    that, and the share that the profile itself shows."""

    share: float
    products: float
    profiled: float


@dataclass(frozen=True)
class Footprint:
    """One prune run in a process of its own: parameters, images, peak bytes and seconds by phase."""

    params: int
    images: int
    peak: int
    phases: dict[str, float]


def interleaved(calls: Sequence[Call], rounds: int) -> list[list[float]]:
    """Milliseconds of process time of each call; they take turns, in both orders."""
    times: list[list[float]] = [[] for _ in calls]
    for number in range(rounds + 2):
        order = range(len(calls)) if number % 2 == 0 else reversed(range(len(calls)))
        for index in order:
            start = time.process_time()
            calls[index]()
            if number >= 2:  # the first calls allocate and choose kernels
                times[index].append(1000 * (time.process_time() - start))
    return times


def prune_for_latency(model: str, root: Path, seed: int, settings: Sequence[tuple[str, float]]) -> list[Path]:
    """One-shot prunes, one folder for each (budget, sparsity); everything else by default."""
    folders = []
    for budget, sparsity in settings:
        folders.append(root / f"{budget}-{sparsity}")
        gfprune_cli.prune(
            model, out=folders[-1], budget=budget, sparsity=sparsity, seed=seed, **ONE_SHOT, force=True
        )
    return folders


def caller(runtime: str, model: str, inputs: dict[str, torch.Tensor], root: Path) -> Call:
    """One evaluation of a checkpoint in a runtime; what is exported for it stays in `root`."""
    if runtime == "eager":
        return partial(gfprune_cli.load(model), **inputs)
    file, load = EXPORTED[runtime]
    return partial(load(exported(runtime, model, root) / file), inputs)


def exported(runtime: str, model: str, root: Path) -> Path:
    """A checkpoint exported for a runtime, once."""
    out = root / f"{runtime}-{Path(model).name}"
    if not out.exists():
        gfprune_cli.export(model, format=runtime, out=out)
    return out


def inputs_of(config: Any, batch: int) -> dict[str, torch.Tensor]:
    """Noise, at one timestep."""
    shape = (batch, config.in_channels, config.sample_size, config.sample_size)
    sample = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return {"sample": sample, "timestep": torch.full((batch,), 500)}


def latency_gains(
    model: str, folders: Sequence[Path], runtimes: Sequence[str], batches: Sequence[int], rounds: int
) -> list[Gain]:
    """Dense and pruned networks in turn: one row for each runtime, batch and folder."""
    config = gfprune_cli.load(model).config
    rows = []
    for runtime in runtimes:
        for batch in batches:
            inputs = inputs_of(config, batch)
            calls = [caller(runtime, name, inputs, folders[0].parent) for name in (model, *map(str, folders))]
            with torch.inference_mode():
                dense, *pruned = interleaved(calls, rounds)
            for folder, times in zip(folders, pruned, strict=True):
                rows.append(gain(runtime, batch, folder, dense, times))
    return rows


def gain(runtime: str, batch: int, folder: Path, dense: Sequence[float], pruned: Sequence[float]) -> Gain:
    record = json.loads((folder / "gfprune.json").read_text())
    ratios = [a / b for a, b in zip(dense, pruned, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Gain(
        runtime,
        batch,
        record["recipe"]["budget"],
        record["recipe"]["sparsity"],
        record["macs"]["before"] / record["macs"]["after"],
        statistics.median(dense),
        statistics.median(pruned),
        middle,
        low,
        high,
    )


def gains_table(rows: Sequence[Gain], limits: Sequence[Limit]) -> str:
    head = ("runtime", "batch", "pruned with", *TIMES, "share at most", "products")
    cells = (
        [
            *(r.runtime, str(r.batch), f"`--budget {r.budget} --sparsity {r.sparsity:g}`", *r.cells),
            *(f"{limit.share:.2f}", f"{limit.products:.2f}x"),
        ]
        for r, limit in zip(rows, limits, strict=True)
    )
    return "\n".join(table(head, cells))


def kind_of(runtime: str, operator: str) -> str:
    """What an operator's own time is: products, work per number, or none of either."""
    if any(part in operator for part in PRODUCTS):
        return "products"
    return "dispatch" if operator.rpartition("::")[2] in DISPATCH[runtime] else "elementwise"


def time_by_kind(runtime: str, events: Iterable[tuple[str, float]]) -> Kinds:
    found = {"products": 0.0, "elementwise": 0.0, "dispatch": 0.0}
    for operator, milliseconds in events:
        found[kind_of(runtime, operator)] += milliseconds
    return found


def eager_profiler(model: str, batch: int, root: Path) -> Callable[[], Kinds]:
    """What profiles one evaluation of a checkpoint in eager PyTorch."""
    network = gfprune_cli.load(model).eval()
    inputs = inputs_of(network.config, batch)

    def once() -> Kinds:
        with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU]) as profiler:
            network(**inputs)
        averages = profiler.key_averages()
        return time_by_kind("eager", ((event.key, event.self_cpu_time_total / 1000) for event in averages))

    return once


def onnx_profiler(model: str, batch: int, root: Path) -> Callable[[], Kinds]:
    """The same in ONNX Runtime, which keeps one profile of a session."""
    import onnxruntime

    config = gfprune_cli.load(model).config
    file = exported("onnx", model, root) / EXPORTED["onnx"][0]
    feed = {name: tensor.numpy() for name, tensor in inputs_of(config, batch).items()}

    def once() -> Kinds:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.enable_profiling, options.profile_file_prefix = True, str(root / "profile")
        session = onnxruntime.InferenceSession(file, options, ["CPUExecutionProvider"])
        for _ in range(2):  # the first allocates
            session.run(None, feed)
        path = Path(session.end_profiling())
        nodes = [event for event in json.loads(path.read_text()) if event.get("cat") == "Node"]
        path.unlink()
        last = [event for event in nodes if event["name"].endswith("_kernel_time")][len(nodes) // 2 :]
        return time_by_kind("onnx", ((e["args"]["op_name"].lower(), e["dur"] / 1000) for e in last))

    return once


PROFILERS = {"eager": eager_profiler, "onnx": onnx_profiler}


def profiles(
    model: str, folders: Sequence[Path], runtime: str, batch: int, rounds: int
) -> tuple[Kinds, list[Kinds]]:
    """The dense network's milliseconds by kind, and those of each folder: medians; networks take turns."""
    root = folders[0].parent
    calls = [PROFILERS[runtime](name, batch, root) for name in (model, *map(str, folders))]
    for call in calls:
        call()
    turns = [[call() for call in calls] for _ in range(rounds)]
    dense, *pruned = (
        {kind: statistics.median(turn[index][kind] for turn in turns) for kind in turns[0][index]}
        for index in range(len(calls))
    )
    return dense, pruned


def limit_of(dense: Kinds, pruned: Kinds, mac_ratio: float) -> Limit:
    promised = dense["products"] / mac_ratio
    best = sum(dense.values()) / sum((pruned | {"products": promised}).values())
    profiled = sum(dense.values()) / sum(pruned.values())
    return Limit(best / mac_ratio, pruned["products"] / promised, profiled / mac_ratio)


def profile_tables(
    model: str, folders: Sequence[Path], rows: Sequence[Gain], rounds: int
) -> tuple[str, list[Limit]]:
    """Where the time goes, in the order of `rows`; and what a perfect runtime of products would gain."""
    cells: list[list[str]] = []
    limits = []
    for runtime, batch in dict.fromkeys((row.runtime, row.batch) for row in rows):
        dense, pruned = profiles(model, folders, runtime, batch, rounds)
        names = ["dense", *(folder.name for folder in folders)]
        for name, found in zip(names, [dense, *pruned], strict=True):
            cells.append([runtime, str(batch), name, *(f"{ms:.2f}" for ms in found.values())])
        ratios = [row.mac_ratio for row in rows if (row.runtime, row.batch) == (runtime, batch)]
        limits += [limit_of(dense, found, ratio) for found, ratio in zip(pruned, ratios, strict=True)]
    head = ("runtime", "batch", "network", *(f"{kind}, ms" for kind in dense))
    return "\n".join(table(head, cells)), limits


def scoring_table(model: str, criteria: Sequence[str], draws: int, repeats: int, seed: int) -> str:
    """The cost of one scoring in gradients over the same draws: counted, and as time."""
    component = inspect(resolve(model))
    plan = make_plan(resolve(model), PruneRecipe(model=model), silent)
    process = noising_process(load_scheduler(component))
    masked = MaskedModel(load_model(component), plan.groups)
    config = masked.model.config
    shape = (32, config.in_channels, config.sample_size, config.sample_size)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).clamp(-1, 1)
    losses = scoring_losses(masked, process, Draws(images, process.steps, seed), 1, draws, 16, silent)
    effective = {name: weight.detach() for name, weight in masked.weights.items()}
    counted: dict[str, float] = {}

    def once(criterion: Any) -> None:
        evidence = Evidence(masked, losses, seed)
        score(criterion, evidence)
        counted[criterion] = evidence.gradients

    calls: list[Call] = [lambda: gradient(losses, effective)]
    calls += [lambda criterion=name: once(criterion) for name in criteria]
    base, *times = interleaved(calls, repeats)
    rows = []
    for name, values in zip(criteria, times, strict=True):
        ratio = statistics.median(a / b for a, b in zip(values, base, strict=True))
        seconds = statistics.median(values) / 1000
        rows.append([f"`{name}`", f"{counted[name]:.2f}", f"{ratio:.2f}", f"{seconds:.2f}"])
    return "\n".join(table(("criterion", "gradients, counted", "time in gradients", "seconds"), rows))


def random_pipeline(folder: Path, width: int, seed: int) -> Path:
    """A DDPM U-Net of random weights whose widths are multiples of `width`, on 16 x 16 images."""
    torch.manual_seed(seed)
    network = UNet2DModel(
        sample_size=16,
        layers_per_block=1,
        block_out_channels=(width, 2 * width, 2 * width),
        norm_num_groups=8,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    )
    DDPMPipeline(network, DDPMScheduler()).save_pretrained(folder)
    return folder


def footprint(model: str, root: Path, seed: int, **settings: Any) -> Footprint:
    """Peak memory, above what imports take, and seconds by phase of one prune run with an empty cache."""
    cache = tempfile.mkdtemp(prefix="cache-", dir=root)
    asked = SMALL_RUN | settings | dict(model=model, out=str(root / "out"), seed=seed, force=True)
    found = in_a_process(MEASURE, json.dumps(asked), cache=Path(cache))
    return Footprint(found["params"], asked["images"], found["peak"], found["phases"])


def footprint_table(rows: Sequence[Footprint]) -> str:
    phases = list(dict.fromkeys(name for row in rows for name in row.phases))
    head = ["parameters", "images", "peak memory, MB", *(f"{name}, s" for name in phases), "all, s"]
    lines = []
    for row in rows:
        size = [f"{row.params / 1e6:.2f} M", str(row.images), f"{row.peak / 1e6:.0f}"]
        seconds = [row.phases.get(name, 0) for name in phases]
        lines.append([*size, *(f"{one:.1f}" for one in (*seconds, sum(seconds)))])
    return "\n".join(table(head, lines))


def plot_gains(rows: Sequence[Gain], path: Path) -> None:
    """Latency gain over MAC gain; on the diagonal time follows MACs."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 4), layout="constrained")
    for runtime, batch in dict.fromkeys((row.runtime, row.batch) for row in rows):
        points = sorted((r.mac_ratio, r.speedup) for r in rows if (r.runtime, r.batch) == (runtime, batch))
        axes.plot(*zip(*points, strict=True), marker="o", label=f"{runtime}, batch {batch}")
    end = max(row.mac_ratio for row in rows)
    axes.plot([1, end], [1, end], color="grey", linestyle=":", label="time follows MACs")
    axes.set(xlabel="MAC gain", ylabel="latency gain")
    axes.legend()
    save_figure(figure, path)


def plot_growth(rows: Sequence[Footprint], path: Path) -> None:
    """Peak memory and seconds by phase over model size."""
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    millions = [row.params / 1e6 for row in rows]
    left.loglog(millions, [row.peak / 1e6 for row in rows], marker="o")
    left.set(xlabel="million parameters", ylabel="peak memory, MB")
    for name in dict.fromkeys(phase for row in rows for phase in row.phases):
        right.loglog(millions, [max(row.phases.get(name, 0), 1e-2) for row in rows], marker="o", label=name)
    right.set(xlabel="million parameters", ylabel="seconds")
    figure.legend(loc="outside right upper", fontsize="small")
    save_figure(figure, path)


def save_figure(figure: Any, path: Path) -> None:
    """The same figure gives the same file."""
    from matplotlib import pyplot as plt

    with plt.rc_context({"svg.hashsalt": path.stem}):
        figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def page(command: str, seed: int, sections: dict[str, str]) -> str:
    """The whole of `speed.md`."""
    body = "".join(f"\n## {title}\n\n{text}\n" for title, text in sections.items())
    return f"# Speed, memory and cost\n\n{header(command, seed)}{body}"


GAINS_TEXT = """One-shot prunes of the demo with the default `--align 1`. *Gain* is dense time over pruned
time, *share* is that over the MAC gain; *share at most*, by a profile, if products had taken the time that
their multiply-accumulates promise and the rest its own; *products*, the time that they took of that.

![Latency gain over MAC gain](speed-gains.svg)

"""
PROFILE_TEXT = """Own time of operators in the profilers of PyTorch and ONNX Runtime, which adds to each.
*Products*: convolutions, linear layers, attention. *Elementwise*: norms, activations, additions, copies,
concatenation. *Dispatch*: operators that compute nothing. Medians; profilers count time on the wall.

"""
GROWTH_TEXT = """U-Nets of random weights on 16 x 16 images; 3 scorings of 16 draws, 12 steps of recovery,
2 sampling steps; each in a process of its own. Memory is above what imports take.

![Growth with model size](speed-growth.svg)

"""
IMAGES_TEXT = """The same with the demo, 20 sampling steps per image as by default.

"""


def verdict(gains: Sequence[Gain], limits: Sequence[Limit]) -> str:
    """How many rows reach the share that is aimed at, and what the others stop at."""
    missed = [limit for gain, limit in zip(gains, limits, strict=True) if gain.share < WANTED]
    rest = sum(limit.share < WANTED for limit in missed)
    reached = sum(limit.share >= WANTED and limit.profiled >= WANTED for limit in missed)
    return (
        f"\n\nThe aim is a share of {WANTED}: {len(gains) - len(missed)} of {len(gains)} rows reach it. In "
        f"{rest} of the {len(missed)} others norms, activations, copies and dispatch alone take too long for "
        f"it; in {len(missed) - rest - reached} it is narrow products that are slower than their count; "
        f"{reached} reach it in the profile, which was taken at another time of the run."
    )


def run(options: argparse.Namespace, root: Path) -> Iterator[tuple[str, str]]:
    """Title and text of every section, in the order of the page."""
    quick = options.quick
    batches, rounds = ([1, 16], 15) if quick else ([1, 16, 64], 40)
    folders = prune_for_latency("demo", root, options.seed, SETTINGS)
    gains = latency_gains("demo", folders, ["eager"] if quick else ["eager", "onnx"], batches, rounds)
    plot_gains(gains, options.out / "speed-gains.svg")
    profiled, limits = profile_tables("demo", folders, gains, 3 if quick else 11)
    yield "Latency gain over MAC gain", GAINS_TEXT + gains_table(gains, limits) + verdict(gains, limits)
    yield "Where the time goes", PROFILE_TEXT + profiled
    criteria, repeats = list(CRITERIA), 3 if quick else 7
    yield "Cost of scoring", scoring_table("demo", criteria, 32, repeats, options.seed)
    sizes = []
    for width in (24, 48) if quick else (24, 48, 96, 192):
        model = random_pipeline(root / f"random-{width}", width, options.seed)
        sizes.append(footprint(str(model), root, options.seed))
    plot_growth(sizes, options.out / "speed-growth.svg")
    yield "Growth with model size", GROWTH_TEXT + footprint_table(sizes)
    counts = (16, 64) if quick else (16, 64, 256, 1024)
    images = [footprint("demo", root, options.seed, images=count, sample_steps=20) for count in counts]
    yield "Growth with images", IMAGES_TEXT + footprint_table(images)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer batches, rounds, sizes; no ONNX")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch and ONNX Runtime")
    parser.add_argument("--out", type=Path, help="folder (default: docs/benchmarks, or quick/ in it)")
    options = parser.parse_args()
    options.out = options.out or (PAGES / "quick" if options.quick else PAGES)
    torch.set_num_threads(options.threads)
    command = shlex.join(["python", "benchmarks/speed.py", *sys.argv[1:]])
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        sections: dict[str, str] = {}
        for title, text in run(options, Path(temporary)):  # what a run that is stopped has measured stands
            sections[title] = text
            (options.out / "speed.md").write_text(page(command, options.seed, sections), encoding="utf-8")
            print(f"\n## {title}\n\n{text}", flush=True)


if __name__ == "__main__":
    main()
