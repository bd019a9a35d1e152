"""The formats of `export`: one file and one row each."""

from gfprune_cli.deploy import comfyui, onnx, openvino, safetensors, torch_export
from gfprune_cli.deploy.format import Format

FORMATS: dict[str, Format] = {
    "safetensors": safetensors.FORMAT,
    "onnx": onnx.FORMAT,
    "torch-export": torch_export.FORMAT,
    "openvino": openvino.FORMAT,
    "comfyui": comfyui.FORMAT,
}
