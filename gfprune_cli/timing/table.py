"""The times of a network on one device and runtime: a table as a file, and as a cost of a cost model."""

import itertools
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from annotated_types import Ge, Gt, Le, MinLen

from gfprune_cli.errors import UsageError
from gfprune_cli.outputs.durable import write_file
from gfprune_cli.structure.cost import CostModel
from gfprune_cli.structure.times import NONE, Grid, LayerTimes
from gfprune_cli.timing.kinds import Run

FILE_BYTES = 16 << 20
Width = Annotated[int, Ge(1), Le(1 << 20)]
Part = Annotated[float, Ge(0), Le(1)]
Time = Annotated[float, Ge(0), Le(1e9)]


@dataclass(frozen=True)
class Points:
    """Milliseconds of one kind of layer: `ms[i][j]` at `out[i]` outputs and `into[j]` inputs; see `Grid`."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "allow_inf_nan": False}

    out: Annotated[list[Width], MinLen(2)]
    into: Annotated[list[Width], MinLen(2)]
    ms: list[list[Time]]
    out_padding: tuple[Part, Part] = NONE
    into_padding: tuple[Part, Part] = NONE

    def __post_init__(self) -> None:
        for widths in (self.out, self.into):
            if any(a >= b for a, b in itertools.pairwise(widths)):
                raise ValueError("widths have to ascend")
        if [len(self.out), *map(len, self.ms)] != [len(self.ms), *[len(self.into)] * len(self.ms)]:
            raise ValueError("there is one time for each pair of widths")

    def grid(self, scale: float) -> Grid:
        out, into, ms = (np.array(values, np.float64) for values in (self.out, self.into, self.ms))
        return Grid(out, into, ms * scale, self.out_padding, self.into_padding).smoothed()


@dataclass(frozen=True)
class TimeTable:
    """What was measured of one network.

    Args:
        where: device, runtime, precision, batch, sizes, threads, versions.
        network: SHA-256 of its configuration.
        kinds: label of a kind of layer -> its times.
        scale: of all of them: layers run faster or slower among others than alone.
        per_number: milliseconds of norms, activations and copies for each number that a layer puts out.
        per_layer: milliseconds of each layer, however narrow: launching.
        ms: milliseconds of the dense network: median and quartiles.
        steady: whether they were known to about 1 %.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "allow_inf_nan": False}

    where: dict[str, Any]
    network: str
    kinds: dict[str, Points]
    scale: Time
    per_number: Time
    per_layer: Time
    ms: tuple[Annotated[float, Gt(0), Le(1e9)], Time, Time]
    steady: bool

    def document(self) -> dict[str, Any]:
        """As JSON keeps it."""
        found: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return found

    def attach(self, cost: CostModel, runs: Mapping[str, Run]) -> None:
        """Make time a cost of a cost model.

        Args:
            runs: of the same network.

        Raises:
            UsageError: the table knows nothing of a kind of layer.
        """
        left = dict(runs)
        found = [left.pop(layer.name, Run(None)) for layer in cost.layers]  # a name counts once
        labels = dict.fromkeys(run.kind.label for run in found if run.kind is not None)
        if unknown := [label for label in labels if label not in self.kinds]:
            raise UsageError(
                f"--times: the table has no times of {unknown[0]!r}: it was measured for another network "
                "or size; measure it for this one with gfprune analyze --times-out"
            )
        known = {label: self.kinds[label].grid(self.scale) for label in labels}
        grids = [None if run.kind is None else known[run.kind.label] for run in found]
        slopes = np.array([run.places for run in found], np.float64) * self.per_number
        calls = [run.calls for run in found]
        cost.times = LayerTimes(grids, calls, slopes, np.array([bool(n) for n in calls]) * self.per_layer)


def write_table(path: Path, table: TimeTable) -> None:
    """The file appears whole or not at all."""
    write_file(path, (json.dumps(table.document(), sort_keys=True) + "\n").encode())


def check_table_file(path: Path, *, force: bool) -> None:
    """Refuse, before the work, to write a table where another file is.

    Raises:
        UsageError: it exists, or its folder does not.
    """
    if path.is_dir() or not path.parent.is_dir():
        raise UsageError(f"--times-out {path}: name a file in a folder that exists")
    if path.exists() and not force:
        raise UsageError(f"--times-out {path} exists: use --force to replace it, or another name")
    if path.exists():
        try:
            read_table(path)
        except UsageError:
            raise UsageError(
                f"--times-out {path} is a file of another kind, and --force replaces none: name another"
            ) from None


def table_of(document: Any, what: str) -> TimeTable:
    """A table from a document that anyone may have written.

    Args:
        what: as messages call it.

    Raises:
        UsageError: it is none.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(TimeTable).validate_python(document)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])[:80]
        raise UsageError(
            f"{what} is no table of times ({place}: {first['msg']}): "
            "write one with gfprune analyze --times-out"
        ) from None


def read_table(path: Path) -> TimeTable:
    """The table that `gfprune analyze --times-out` wrote.

    Raises:
        UsageError: it cannot be read, or is none.
    """
    try:
        if path.stat().st_size > FILE_BYTES or not path.is_file():
            raise UsageError(
                f"--times {path} is no table of times: it is no file of at most {FILE_BYTES} bytes"
            )
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise UsageError(f"--times {path}: {error.strerror}; check the path") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"--times {path} is no JSON: write it with gfprune analyze --times-out") from error
    return table_of(document, f"--times {path}")
