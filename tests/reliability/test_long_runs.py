"""Memory does not grow with the length of a run."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

MEGABYTE = 1 << 20
SLACK = 16 * MEGABYTE  # of allocators that keep what they were given back


@pytest.mark.thorough  # long by its nature
@pytest.mark.parametrize("command", ["finetune", "eval"])
def test_memory_is_flat(
    command: str, thorough: bool, smallest_folder: Path, pruned: Path, tmp_path: Path,
    record: Callable[[str], None],
) -> None:  # fmt: skip
    """The last quarter of a network's run holds no more than the second; thorough: 2,000 steps or images."""
    count = 2000 if thorough else 24 if command == "finetune" else 48  # images are drawn in batches of 4
    other = tmp_path / "out" if command == "finetune" else smallest_folder
    script = Path(__file__).with_name("long_run.py")
    done = subprocess.run(
        [sys.executable, str(script), command, str(pruned), str(other), str(count)],
        capture_output=True, text=True, check=False, timeout=14400 if thorough else 500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    points = json.loads(done.stdout.splitlines()[-1])["points"]
    networks = 1 if command == "finetune" else 2  # eval samples from one network, then from the other
    for number in range(networks):
        own = points[number * len(points) // networks : (number + 1) * len(points) // networks]
        assert len(own) >= 10
        quarter = len(own) // 4
        early, late = own[quarter : 2 * quarter], own[-quarter:]
        held = early[0]["bytes"] / MEGABYTE
        grown = max(point["bytes"] for point in late) - max(point["bytes"] for point in early)
        tensors = [max(point["tensors"] for point in part) for part in (early, late)]
        record(
            f"memory over {count} of {command}: {held:.0f} MiB in the second quarter, "
            f"{grown / MEGABYTE:+.1f} MiB in the last; tensors {tensors[0]} and {tensors[1]}"
        )
        assert grown < SLACK
        assert tensors[1] <= tensors[0]
