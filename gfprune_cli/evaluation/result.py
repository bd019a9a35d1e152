"""What an evaluation found, as numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from gfprune_cli.checkpoint.record import SCHEMA_VERSION, installed_tools, installed_version
from gfprune_cli.errors import UsageError
from gfprune_cli.recipes.evaluate import EvalRecipe
from gfprune_cli.recipes.options import option_names

Png = bytes  # `bytes` is a field of the result
MORE_TOOLS = ("accelerate", "clean-fid", "numpy", "pytorch-msssim")


@dataclass(frozen=True)
class Gate:
    """A quality gate, and whether the model passed it; one that could not be measured (None) is missed."""

    name: str
    limit: float
    value: float | None
    passed: bool


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """What an evaluation found; `document()` is the JSON of the command, `grid` PNG pairs for the page."""

    model: str
    reference: str | None
    component: str
    class_name: str
    samples: Mapping[str, Any]
    metrics: Mapping[str, Mapping[str, Any]]
    loss_by_timestep: Sequence[Mapping[str, Any]]
    latency: Sequence[Mapping[str, Any]]
    params: Mapping[str, int | None]
    macs: Mapping[str, int | None]
    bytes: Mapping[str, int | None]
    memory: Mapping[str, Any]
    gates: Sequence[Gate]
    warnings: Sequence[str]
    fold: Mapping[str, Any] | None
    device: str
    tools: Mapping[str, str | None]
    recipe: Mapping[str, Any]
    seconds: float
    grid: Sequence[tuple[Png, Png]] = field(default=(), repr=False)

    def document(self) -> dict[str, Any]:
        found = asdict(self)
        del found["grid"]
        return {"schema_version": SCHEMA_VERSION, "command": "eval", **found}

    @property
    def missed(self) -> list[Gate]:
        """The gates that the model did not pass."""
        return [gate for gate in self.gates if not gate.passed]


def tools() -> dict[str, str | None]:
    """Versions of what decides the numbers."""
    return installed_tools() | {tool: installed_version(tool) for tool in MORE_TOOLS}


def gate_rows(recipe: EvalRecipe) -> list[tuple[str, float, str]]:
    """(name, limit, metric) of the gates that the user asked for."""
    names = [name for name in option_names(recipe) if name.startswith(("min_", "max_"))]
    limits = [(name.replace("_", "-"), getattr(recipe, name), name[4:]) for name in names]
    return [(name, limit, metric) for name, limit, metric in limits if limit is not None]


def check_gates(recipe: EvalRecipe, why_not: Mapping[str, str]) -> None:
    """Refuse, before the work, a gate on a metric that the run will not compute.

    Args:
        why_not: metric -> why there will be none.

    Raises:
        UsageError: there is such a gate.
    """
    for name, _, metric in gate_rows(recipe):
        if metric in why_not:
            raise UsageError(f"--{name}: there will be no {metric} to compare with: {why_not[metric]}")


def passed_gates(
    recipe: EvalRecipe, metrics: Mapping[str, Mapping[str, Any]], latency: Sequence[Mapping[str, Any]]
) -> list[Gate]:
    """The gates, with what was measured; the speed-up is the eager one at the largest batch."""
    eager = [row for row in latency if row["mode"] == "eager"]
    values = {name: metric["value"] for name, metric in metrics.items()}
    if eager:
        values["speedup"] = max(eager, key=lambda row: row["batch"])["speedup"]
    gates = []
    for name, limit, metric in gate_rows(recipe):
        value = values.get(metric)
        passed = value is not None and (value <= limit if name.startswith("max") else value >= limit)
        gates.append(Gate(name, limit, value, passed))
    return gates
