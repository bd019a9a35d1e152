"""What each exported artefact costs per call, dense beside pruned, on this machine's CPU.

    python benchmarks/export.py

Prunes the demo in one shot (latency does not depend on training), exports dense and pruned networks to
every format, and calls all of them in turn, round by round, on one thread. The time is the CPU time of the
process, so that other work on the machine does not count; the speed-up is the median over the rounds of
dense time over pruned time, with its quartiles. `goal` is 0.7 of the MAC ratio.
"""

import argparse
import importlib.util
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import gfprune_cli
from gfprune_cli.deploy.network import Denoiser
from gfprune_cli.deploy.onnx_model import run_onnx
from gfprune_cli.deploy.torch_program import run_program

SHARE = 0.7
QUICK: dict[str, Any] = dict(one_shot=True, images=32, sample_steps=4, draws=16)
PRUNED: dict[str, dict[str, Any]] = {
    "params 0.5": dict(sparsity=0.5),
    "macs 0.5": dict(sparsity=0.5, budget="macs"),
    "native 0.5": dict(sparsity=0.5, layout="native"),
}
Runner = Callable[[dict[str, torch.Tensor]], torch.Tensor]


def eager(model: str) -> Runner:
    """The source network in PyTorch, uncompiled."""
    network = Denoiser(gfprune_cli.load(model), torch.float32)
    return lambda inputs: network(**inputs)


def openvino_runner(path: Path) -> Runner:
    """OpenVINO in float32 on one thread."""
    import openvino

    exact = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = openvino.Core().compile_model(path, "CPU", exact)
    return lambda inputs: torch.from_numpy(
        compiled({name: tensor.numpy() for name, tensor in inputs.items()})["output"]
    )


def runners(model: str, folder: Path) -> dict[str, Runner]:
    """Runtime -> the network in it, exported afresh."""
    found: dict[str, Runner] = {"PyTorch, eager": eager(model)}
    gfprune_cli.export(model, format="torch-export", out=folder / "program")
    found["torch-export"] = run_program(folder / "program" / "model.pt2")
    gfprune_cli.export(model, format="onnx", out=folder / "onnx")
    found["ONNX Runtime"] = run_onnx(folder / "onnx" / "model.onnx", threads=1)
    if importlib.util.find_spec("openvino") is not None:
        gfprune_cli.export(model, format="openvino", out=folder / "openvino")
        found["OpenVINO"] = openvino_runner(folder / "openvino" / "openvino_model.xml")
    return found


def prune_all(folder: Path, align: int | None) -> dict[str, tuple[str, float]]:
    """Name -> (checkpoint, dense MACs over its MACs); the dense demo first."""
    models = {"dense": ("demo", 1.0)}
    for name, settings in PRUNED.items():
        out = folder / name.replace(" ", "-")
        result = gfprune_cli.prune("demo", out=out, align=align, **settings, **QUICK)
        models[name] = (str(out), result.macs["before"] / result.macs["after"])
    return models


@torch.no_grad()
def measure(networks: dict[tuple[str, str], Runner], batch: int, rounds: int) -> dict[Any, list[float]]:
    """(model, runtime) -> milliseconds of CPU time of each call; all are called once per round."""
    source = torch.Generator().manual_seed(0)
    inputs = {
        "sample": torch.randn(batch, 3, 32, 32, generator=source),
        "timestep": torch.full((batch,), 500),
    }
    times: dict[Any, list[float]] = {key: [] for key in networks}
    for number in range(rounds + 2):
        for key, run in networks.items():
            start = time.process_time()
            run(inputs)
            if number >= 2:  # the first calls allocate and choose kernels
                times[key].append(1000 * (time.process_time() - start))
    return times


def table(times: dict[Any, list[float]], models: dict[str, tuple[str, float]], batch: int) -> list[Any]:
    """Print one batch size as Markdown; the rows as data."""
    print(f"\nbatch {batch}\n")
    print("| runtime | model | ms | speed-up [quartiles] | MAC ratio | goal | share of the MAC ratio |")
    print("|---|---|---|---|---|---|---|")
    rows = []
    for (name, runtime), values in times.items():
        ratios = [a / b for a, b in zip(times["dense", runtime], values, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        macs = models[name][1]
        goal = "" if name == "dense" else f"{SHARE * macs:.2f}"
        print(
            f"| {runtime} | {name} | {statistics.median(values):.2f} | {middle:.2f} [{low:.2f}, {high:.2f}] "
            f"| {macs:.2f} | {goal} | {middle / macs:.2f} |"
        )
        rows.append({"batch": batch, "runtime": runtime, "model": name, "speedup": middle, "macs": macs})
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--align", type=int, help="of the pruned widths (default: gfprune's)")
    parser.add_argument("--json", type=Path, help="also write the speed-ups here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        checkpoints = prune_all(Path(temporary), options.align)
        networks = {
            (name, runtime): run
            for name, (checkpoint, _) in checkpoints.items()
            for runtime, run in runners(checkpoint, Path(temporary) / f"exports-{name}").items()
        }
        rows = []
        for size in options.batches:
            rows += table(measure(networks, size, options.rounds), checkpoints, size)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")
