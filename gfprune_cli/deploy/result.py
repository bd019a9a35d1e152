"""What an export run did, as numbers."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from gfprune_cli.checkpoint.record import SCHEMA_VERSION
from gfprune_cli.deploy.parity import Parity

Made = tuple[Any, dict[str, int], Parity]  # inputs of the graphs, files and their bytes, distance


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """What an export run did; `document()` is the JSON of the command.

    Args:
        output: the folder or file; None for a dry run.
        opset: of an ONNX model, else None.
        shards: weight files of a safetensors export, else None.
        bytes: size of the artefact; an estimate for a dry run.
        files: the artefact's files (without configuration and card) -> bytes; estimates for a dry run.
        inputs: name -> dtype and shape of what a graph takes; None for safetensors and for a dry run.
    """

    model: str
    output: str | None
    component: str
    class_name: str
    format: str
    dtype: str
    opset: int | None
    shards: int | None
    bytes: int
    files: Mapping[str, int]
    inputs: Mapping[str, Any] | None
    parity: Parity
    seconds: float

    def document(self) -> dict[str, Any]:
        return {"schema_version": SCHEMA_VERSION, "command": "export", **asdict(self)}
