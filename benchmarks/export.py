"""What each exported artefact costs per call, pruned beside dense, on this machine's CPU.

    python benchmarks/export.py

Prunes the demo in one shot (latency does not depend on training), exports dense and pruned networks to
every format, and calls dense and pruned in turn, round by round, on one thread, with one runtime in memory
at a time. The time is the CPU time of the process, so that other work on the machine counts little; the
speed-up is the median over the rounds of dense time over pruned time, with its quartiles. The last column is
the speed-up over the MAC ratio. `--folder` keeps the checkpoints and exports, and uses those that are there.
"""

import argparse
import importlib.util
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from speed import ONE_SHOT, Gain, gain, inputs_of, interleaved

import gfprune_cli
from gfprune_cli.deploy.network import Denoiser
from gfprune_cli.deploy.onnx import run_onnx
from gfprune_cli.deploy.torch_export import run_program

PRUNED: dict[str, dict[str, Any]] = {
    "params": dict(sparsity=0.5, budget="params", align=4),
    "macs": dict(sparsity=0.5, budget="macs", align=4),
    "macs, align 16": dict(sparsity=0.5, budget="macs", align=16),
    "native": dict(sparsity=0.5, budget="params", layout="native"),
}
FILES = {"torch-export": "model.pt2", "onnx": "model.onnx", "openvino": "openvino_model.xml"}
Runner = Callable[[dict[str, torch.Tensor]], torch.Tensor]


def load_eager(model: str) -> Runner:
    """The source network in PyTorch, uncompiled."""
    network = Denoiser(gfprune_cli.load(model), torch.float32)
    return lambda inputs: network(**inputs)


def load_openvino(path: Path) -> Runner:
    """OpenVINO in float32 on one thread."""
    import openvino

    exact = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = openvino.Core().compile_model(path, "CPU", exact)
    return lambda inputs: torch.from_numpy(
        compiled({name: tensor.numpy() for name, tensor in inputs.items()})["output"]
    )


def load(runtime: str, model: str, folder: Path) -> Runner:
    """One network in one runtime."""
    if runtime == "eager":
        return load_eager(model)
    path = folder / runtime / FILES[runtime]
    if runtime == "onnx":
        return run_onnx(path, threads=1)
    return run_program(path) if runtime == "torch-export" else load_openvino(path)


def prepare(root: Path, runtimes: list[str]) -> dict[str, str]:
    """Prune and export what is not there yet; name -> checkpoint, the dense one first."""
    models = {"dense": "demo"}
    for name, settings in PRUNED.items():
        out = root / name / "checkpoint"
        if not out.exists():
            gfprune_cli.prune("demo", out=out, **settings, **ONE_SHOT)
        models[name] = str(out)
    for name, model in models.items():
        for runtime in runtimes:
            if runtime in FILES and not (root / name / runtime).exists():
                gfprune_cli.export(model, format=runtime, out=root / name / runtime)
    return models


def row(model: str, found: Gain) -> str:
    """One measurement as a row of Markdown."""
    return (
        f"| {found.runtime} | {found.batch} | {model} | {found.mac_ratio:.2f} "
        f"| {found.dense:.2f} | {found.pruned:.2f} "
        f"| {found.speedup:.2f} [{found.low:.2f}, {found.high:.2f}] | {found.share:.2f} |"
    )


def main(root: Path, batches: list[int], rounds: int) -> None:
    # OpenVINO last: its threads go on spinning and would count in the time of the process
    runtimes = ["eager", "torch-export", "onnx"]
    runtimes += ["openvino"] if importlib.util.find_spec("openvino") is not None else []
    models = prepare(root, runtimes)
    print("| runtime | batch | model | MAC ratio | dense, ms | pruned, ms | speed-up [quartiles] | share |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for runtime in runtimes:
        dense = load(runtime, "demo", root / "dense")
        for batch in batches:
            for name in PRUNED:
                pruned = load(runtime, models[name], root / name)
                given = inputs_of(gfprune_cli.load(models[name]).config, batch)
                with torch.no_grad():
                    times = interleaved([partial(run, given) for run in (dense, pruned)], rounds)
                print(row(name, gain(runtime, batch, Path(models[name]), *times)), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--folder", type=Path, help="keep checkpoints and exports here (default: nowhere)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        main(options.folder or Path(temporary), options.batches, options.rounds)
