"""A script in a process of its own, whose memory is that of one run."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

STATUS = """
import json, sys
def status(key):  # not ru_maxrss: that one is inherited from the parent
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))
"""


def in_a_process(script: str, *given: Any, cache: Path) -> Any:
    """What a script prints last, as JSON; it may ask `status` of its memory.

    Args:
        cache: the folder of gfprune's caches.

    Raises:
        ChildProcessError: the script failed; what it said is on stderr.
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", STATUS + script, *map(str, given)],
        stdout=subprocess.PIPE,  # what it says on the way is seen
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads()), "GFPRUNE_CACHE": str(cache)},
    )
    if done.returncode:
        raise ChildProcessError(f"the script ended with exit code {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])
