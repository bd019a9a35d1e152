"""Where numbers come from: the lines that open every page of results."""

import os
import platform
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch

PACKAGES = ("torch", "diffusers", "torch-pruning", "safetensors", "accelerate", "numpy")


def processor() -> str:
    """The name of the CPU, as the system knows it."""
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def header(command: str, seed: int) -> str:
    """Markdown that says how to repeat a run, on what it ran and when.

    Args:
        command: exactly as it was typed.
        seed: of the run, or the first of several.
    """
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    tools = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    return "\n".join(
        [
            f"    {command}",
            "",
            f"{date.today().isoformat()}, seed {seed}. {processor()}, {os.cpu_count()} cores, "
            f"{torch.get_num_threads()} torch thread(s); {cuda}. Python {platform.python_version()}, {tools}.",
        ]
    )
