"""OpenVINO: converted from ONNX, run on OpenVINO's CPU device."""

import errno
import shutil
from pathlib import Path

import torch

from gfprune_cli.checkpoint.files import first_line
from gfprune_cli.deploy import onnx
from gfprune_cli.deploy.format import Format
from gfprune_cli.deploy.graph import Graph
from gfprune_cli.deploy.parity import Inputs, Outputs, Runner
from gfprune_cli.errors import GfpruneError
from gfprune_cli.recipes.export import ExportRecipe

FILE = "openvino_model.xml"
# OpenVINO computes in bfloat16 on CPUs that can, whatever the type of the weights; parity means float32.
EXACT = {"INFERENCE_PRECISION_HINT": "f32"}


def write_openvino(folder: Path, onnx_path: Path, *, half: bool) -> None:
    """Write openvino_model.xml and .bin.

    Args:
        onnx_path: the float32 network in ONNX.
        half: store the weights in float16; the arithmetic stays as the runtime chooses.

    Raises:
        GfpruneError: OpenVINO cannot convert the network.
    """
    import openvino

    try:
        # not convert_model, which reports to a telemetry server
        model = openvino.Core().read_model(onnx_path)
    except RuntimeError as error:
        raise GfpruneError(f"OpenVINO cannot convert the network: {first_line(error)}") from error
    # the name and the rt_info carry paths and versions
    model.set_friendly_name("denoiser")
    try:
        openvino.save_model(model, folder / FILE, compress_to_fp16=half)
    except RuntimeError as error:
        code = errno.ENOSPC if shutil.disk_usage(folder).free < onnx_path.stat().st_size else errno.EIO
        raise OSError(code, first_line(error), str(folder / FILE)) from error


def run_openvino(path: Path, threads: int | None = None) -> Runner:
    """A model in OpenVINO on the CPU, in float32 arithmetic.

    Args:
        threads: None leaves it to OpenVINO.
    """
    import openvino

    settings = EXACT if threads is None else {**EXACT, "INFERENCE_NUM_THREADS": threads}
    try:
        compiled = openvino.Core().compile_model(path, "CPU", settings)
    except RuntimeError as error:
        raise GfpruneError(f"OpenVINO cannot run the network on the CPU: {first_line(error)}") from error

    def run(inputs: Inputs) -> Outputs:
        found = compiled({name: tensor.numpy() for name, tensor in inputs.items()})
        return tuple(torch.from_numpy(found[output].copy()) for output in compiled.outputs)

    return run


def write_openvino_graph(folder: Path, graph: Graph, recipe: ExportRecipe) -> Runner:
    """Write a float32 graph by way of ONNX, and load it in OpenVINO."""
    onnx.write_onnx(folder, graph, onnx.DEFAULT_OPSET)
    write_openvino(folder, folder / onnx.FILE, half=recipe.dtype == "fp16")
    for path in folder.glob(f"{onnx.FILE}*"):
        path.unlink()
    return run_openvino(folder / FILE)


FORMAT = Format(
    files=lambda weights: {FILE: 0, Path(FILE).with_suffix(".bin").name: weights},
    loading=lambda job, name: (
        f'import openvino\nmodel = openvino.Core().compile_model("{name}/{FILE}", "CPU")'
    ),
    packages=("onnx", "onnxscript", "openvino"),
    library="openvino",
    graph=write_openvino_graph,
    narrows=True,
    optimum=("optimum.intel", "OVDiffusionPipeline"),
    refuses={
        "bf16": "OpenVINO files hold float32 or float16, and the arithmetic is chosen when they are loaded"
    },
    copies=3,  # by way of ONNX in float32
)
