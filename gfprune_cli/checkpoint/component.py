"""A denoiser on disk, described without its weights."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from gfprune_cli.checkpoint.files import trusted_roots
from gfprune_cli.checkpoint.layout import PRUNED, pipeline_components
from gfprune_cli.checkpoint.safetensors_header import TensorInfo


@dataclass(frozen=True)
class Component:
    """A denoiser on disk, described without its weights.

    Args:
        folder: where its config.json and weights lie.
        name: its name in the pipeline ("unet"), or "" for a bare model folder.
        class_name: see `layout.is_denoiser`.
        config: the parsed config.json.
        weights: the safetensors files; empty if they were not required and are not there.
        tensors: what the files' headers say, by tensor name as stored.
        pipeline: the parsed model_index.json, None for a bare model folder.
        root: the checkpoint's folder.
    """

    folder: Path
    name: str
    class_name: str
    config: dict[str, Any]
    weights: tuple[Path, ...]
    tensors: dict[str, TensorInfo]
    pipeline: dict[str, Any] | None
    root: Path

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
