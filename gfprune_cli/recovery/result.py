"""What a finetune run did, as numbers."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from gfprune_cli.checkpoint.record import SCHEMA_VERSION


@dataclass(frozen=True, kw_only=True)
class FinetuneResult:
    """What a finetune run did; `document()` is the JSON of the command.

    Args:
        loss: denoising loss of the student before and after, and of the teacher, on images kept aside.
        logs: where metrics and samples are; None in a dry run.
    """

    model: str
    teacher: str
    output: str | None
    logs: str | None
    component: str
    class_name: str
    params: int
    steps: int
    processes: int
    seed: int
    loss: Mapping[str, float | None]
    seconds: float

    def document(self) -> dict[str, Any]:
        return {"schema_version": SCHEMA_VERSION, "command": "finetune", **asdict(self)}
