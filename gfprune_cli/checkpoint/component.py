"""A denoiser on disk, described without its weights."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from gfprune_cli.checkpoint.files import trusted_roots
from gfprune_cli.checkpoint.layout import PRUNED, Location, pipeline_components, stock_name
from gfprune_cli.checkpoint.safetensors_header import TensorInfo

OWN_KEYS = ("gfprune", "auto_map", "quantization_config")  # of the pruned class, in its config.json


@dataclass(frozen=True)
class Component(Location):
    """A denoiser on disk, described without its weights.

    Args:
        config: the parsed config.json.
        weights: the safetensors files; empty if they were not required and are not there.
        tensors: what the files' headers say, by tensor name as stored.
    """

    config: dict[str, Any]
    weights: tuple[Path, ...]
    tensors: dict[str, TensorInfo]

    @cached_property
    def entries(self) -> dict[str, tuple[str, str]]:
        """Component name -> (library, class name) of the pipeline around it; none for a bare model folder."""
        return pipeline_components(self.pipeline or {})

    @cached_property
    def roots(self) -> tuple[Path, ...]:
        """The folders that the checkpoint's files may resolve into."""
        return trusted_roots(self.root)

    @property
    def scheduler_name(self) -> str:
        """The entry of its noise scheduler: that of its stage, in a pipeline with a schedule for each."""
        own = f"{self.name.partition('_')[0]}_scheduler"
        return own if own in self.entries else "scheduler"

    @property
    def bytes(self) -> int:
        """Size of the weight files."""
        return sum(path.stat().st_size for path in self.weights)

    @property
    def is_pruned(self) -> bool:
        """Whether this is a network of non-uniform widths that gfprune wrote."""
        return self.class_name.startswith(PRUNED)

    @property
    def stock_config(self) -> dict[str, Any]:
        """The configuration that the stock class has, at its own widths: no keys of the pruned one."""
        config = {key: value for key, value in self.config.items() if key not in OWN_KEYS}
        return {**config, "_class_name": stock_name(self.class_name)}
