"""OpenVINO: converted from ONNX, run on OpenVINO's CPU device."""

import errno
import shutil
from pathlib import Path

import torch

from gfprune_cli.checkpoint.files import first_line
from gfprune_cli.deploy.network import OUTPUT
from gfprune_cli.deploy.parity import Inputs, Runner
from gfprune_cli.errors import GfpruneError

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


def run_openvino(path: Path) -> Runner:
    """A model in OpenVINO on the CPU, in float32 arithmetic."""
    import openvino

    try:
        compiled = openvino.Core().compile_model(path, "CPU", EXACT)
    except RuntimeError as error:
        raise GfpruneError(f"OpenVINO cannot run the network on the CPU: {first_line(error)}") from error

    def run(inputs: Inputs) -> torch.Tensor:
        found = compiled({name: tensor.numpy() for name, tensor in inputs.items()})
        return torch.from_numpy(found[OUTPUT].copy())

    return run
