"""Whether a launcher started this process as one of several; light enough to ask before torch is imported."""

import os


def launched() -> bool:
    """Whether `accelerate launch` or `torchrun` made this one of several processes."""
    return "MASTER_ADDR" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def main_process() -> bool:
    """Whether this is the process that speaks."""
    return not launched() or os.environ.get("RANK", "0") == "0"
