"""The other parts of `gpu.py`: speed-ups asked and measured, and one large network."""

from typing import Any

from gpu_run import FIXED, Run
from large import measured
from report_gpu import budget_row
from speed import random_pipeline
from speedup import asked_rows

NO_ROW: dict[str, float | None] = dict.fromkeys(("first", "measured", "written", "off", "macs"))


def measure_speed(run: Run) -> None:
    """Ask for each speed-up that there is time for, told by the longest so far of its runtime."""
    model = str(random_pipeline(run.work / "wide", run.form.width, run.seed))
    place: dict[str, Any] = {"device": str(run.device), "seed": run.seed}
    place |= {"precision": "bf16"} if run.device.type == "cuda" else {}
    longest: dict[str, float] = {}
    for runtime, batch, asked in run.form.budgets:
        name = budget_row(runtime, batch, asked)
        expected = longest.get(runtime, FIXED)
        if run.clock.left() < expected:
            run.board.note("speed", f"{name} is left out: {run.clock.left():.0f} s are left")
            continue
        with run.attempt(name, "speed"):
            start = run.clock.left()
            (found,) = asked_rows(model, "wide", runtime, batch, [asked], run.work, **place)
            seconds = start - run.clock.left()
            longest[runtime] = max(expected, seconds)
            cells = NO_ROW | {"seconds": seconds}
            if found.time is None or found.written is None:
                run.board.note("speed", f"{name}: {found.why}")
            else:
                cells |= {
                    "first": found.time["trials"][0]["measured"],
                    "measured": found.time["measured"]["speedup"],
                    "written": found.written.value,
                    "off": found.missed,
                    "macs": found.mac_ratio,
                }
            run.board.put_all("speed", name, cells)


def measure_large(run: Run) -> None:
    """Peaks and seconds of `prune`, and of `finetune --lora`, of one large network."""
    with run.attempt("large", "large"):
        for found in measured(run.form.large, run.work, run.seed, str(run.device), finetune=True):
            taken = {"peak": found["peak"], "seconds": sum(found["seconds"].values())}
            run.board.put_all("large", "prune", {"planned": max(found["planned"].values())} | taken)
            if "finetune" in found:
                run.board.put_all("large", "finetune", {"planned": None} | found["finetune"])
