"""What people see of a run while it goes on: a metrics file, an experiment logger, sample grids.

OUT-logs/metrics.jsonl              a JSON object per step: step, loss, its terms, lr, grad_norm, seconds
OUT-logs/samples/step-000100.png    samples of the same noise: dense above, pruned below
"""

import json
import shutil
import time
from collections.abc import Mapping
from contextlib import redirect_stdout, suppress
from io import StringIO
from pathlib import Path
from typing import Any

import torch

from gfprune_cli.data.sample_rows import grid
from gfprune_cli.errors import GfpruneError, UsageError
from gfprune_cli.outputs.durable import replacing
from gfprune_cli.outputs.locks import sweep_folder

METRICS = "metrics.jsonl"


def logs_folder(destination: Path, logs: Path | None) -> Path:
    """Where a run's logs go: beside its output, as that appears only when it is done."""
    return logs if logs is not None else destination.parent / f"{destination.name}-logs"


def check_logs(folder: Path, *, may_replace: bool) -> None:
    """Refuse to mix two runs in one metrics file.

    Raises:
        UsageError: there is one already.
    """
    if (folder / METRICS).exists() and not may_replace:
        raise UsageError(f"{folder / METRICS} is of another run: replace it with --force, or name --logs")


def sweep_logs(folder: Path) -> None:
    """Remove the pictures that killed runs left half-written."""
    sweep_folder(folder / "samples")


def check_logger(logger: str | None) -> None:
    """Refuse before the work, not within it.

    Raises:
        UsageError: it is not installed.
    """
    if logger is None:
        return
    from accelerate.utils import is_tensorboard_available, is_trackio_available

    available = is_tensorboard_available() if logger == "tensorboard" else is_trackio_available()
    if not available:
        raise UsageError(f"--logger {logger} is not installed: pip install 'gfprune[{logger}]'")


def make_tracker(logger: str | None, folder: Path, name: str) -> Any:
    """accelerate's tracker for a logger that `check_logger` accepted; None for none."""
    if logger is None:
        return None
    from accelerate import PartialState
    from accelerate.tracking import TensorBoardTracker, TrackioTracker

    PartialState()  # trackers ask it whether this is the main process
    tracker = (
        TensorBoardTracker(name, str(folder)) if logger == "tensorboard" else TrackioTracker(run_name=name)
    )
    with redirect_stdout(StringIO()):  # loggers talk; stdout is for the result
        tracker.start()
    return tracker


class Watch:
    """Metrics and pictures of one run.

    Args:
        folder: of the logs; made if need be.
        done: steps that an earlier part of the run has logged and that stand.
        tracker: from `make_tracker`.
    """

    def __init__(self, folder: Path, done: int, tracker: Any = None) -> None:
        self.folder, self.tracker = folder, tracker
        self.start = time.monotonic()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            sweep_logs(folder)
            if not done:
                shutil.rmtree(folder / "samples", ignore_errors=True)
            self.file = (folder / METRICS).open("r+" if done and (folder / METRICS).exists() else "w+")
            self.forget_after(done)
        except OSError as error:
            raise GfpruneError(f"cannot write logs in {folder}: {error.strerror}; check --logs") from error

    def forget_after(self, done: int) -> None:
        """Drop the lines of steps that are run again, and a line that was cut short."""
        kept = 0
        for line in self.file:
            try:
                stands = line.endswith("\n") and int(json.loads(line)["step"]) <= done
            except (ValueError, KeyError, TypeError):
                stands = False
            if not stands:
                break
            kept += len(line.encode())
        self.file.seek(kept)
        self.file.truncate()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """One line, readable at once by whoever follows the file."""
        seconds = round(time.monotonic() - self.start, 3)
        try:
            self.file.write(json.dumps({"step": step, **values, "seconds": seconds}) + "\n")
            self.file.flush()
        except OSError as error:
            raise GfpruneError(f"cannot write {self.folder / METRICS}: {error.strerror}") from error
        if self.tracker is not None:
            self.tracker.log(dict(values), step=step)

    def path(self, step: int) -> Path:
        return self.folder / "samples" / f"step-{step:06d}.png"

    def pictured(self, step: int) -> bool:
        """Whether the grid of a step is there."""
        return self.path(step).exists()

    def picture(self, step: int, dense: torch.Tensor, pruned: torch.Tensor) -> None:
        """The grid of a step, whole or not at all."""
        path = self.path(step)
        path.parent.mkdir(exist_ok=True)
        with replacing(path) as staging:
            grid(dense, pruned).save(staging, format="PNG")

    def close(self) -> None:
        with suppress(OSError):  # every line was flushed; one that could not be has been reported
            self.file.close()
        if self.tracker is not None:
            with redirect_stdout(StringIO()):
                self.tracker.finish()
