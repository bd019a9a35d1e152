"""What each exported artefact costs per call, pruned beside dense, on this machine's CPU.

    python benchmarks/export.py

Prunes the demo in one shot (latency does not depend on training), exports dense and pruned networks to
every format, and calls dense and pruned in turn, round by round, on one thread. The time is the CPU time of
the process, so that other work on the machine counts little; the speed-up is the median over the rounds of
dense time over pruned time, with its quartiles. The last column is the speed-up over the MAC ratio.
"""

import argparse
import importlib.util
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

QUICK: dict[str, Any] = dict(one_shot=True, images=32, sample_steps=4, draws=16)
PRUNED: dict[str, dict[str, Any]] = {
    "`--sparsity 0.5`": dict(sparsity=0.5),
    "`--budget macs`": dict(sparsity=0.5, budget="macs"),
    "`--budget macs --align 16`": dict(sparsity=0.5, budget="macs", align=16),
    "`--layout native`": dict(sparsity=0.5, layout="native"),
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


@torch.no_grad()
def measure(dense: Runner, pruned: Runner, batch: int, rounds: int) -> tuple[list[float], list[float]]:
    """Milliseconds of CPU time of each call; the two take turns."""
    source = torch.Generator().manual_seed(0)
    inputs = {
        "sample": torch.randn(batch, 3, 32, 32, generator=source),
        "timestep": torch.full((batch,), 500),
    }
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds + 2):
        for run, values in zip((dense, pruned), times, strict=True):
            start = time.process_time()
            run(inputs)
            if number >= 2:  # the first calls allocate and choose kernels
                values.append(1000 * (time.process_time() - start))
    return times


def table(
    dense: dict[str, Runner],
    pruned: dict[str, dict[str, Runner]],
    macs: dict[str, float],
    batch: int,
    rounds: int,
) -> None:
    """Measure and print one batch size as Markdown."""
    print(f"\nbatch {batch}\n")
    print(
        "| model | MAC ratio | runtime | dense, ms | pruned, ms | speed-up [quartiles] | of the MAC ratio |"
    )
    print("|---|---|---|---|---|---|---|", flush=True)
    for name, networks in pruned.items():
        for runtime, run in networks.items():
            before, after = measure(dense[runtime], run, batch, rounds)
            ratios = [a / b for a, b in zip(before, after, strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            print(
                f"| {name} | {macs[name]:.2f} | {runtime} | {statistics.median(before):.2f} "
                f"| {statistics.median(after):.2f} | {middle:.2f} [{low:.2f}, {high:.2f}] "
                f"| {middle / macs[name]:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        reference = runners("demo", root / "dense")
        networks, shares = {}, {}
        for name, settings in PRUNED.items():
            result = gfprune_cli.prune("demo", out=root / f"pruned {name}", **settings, **QUICK)
            shares[name] = result.macs["before"] / result.macs["after"]
            networks[name] = runners(str(result.output), root / f"exports {name}")
        for size in options.batches:
            table(reference, networks, shares, size, options.rounds)
