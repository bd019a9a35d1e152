"""Whether a launcher started this process as one of several; light enough to ask before torch is imported."""

import os
import threading

from gfprune_cli.errors import UsageError

joined = threading.Event()  # the other processes are there: signals are theirs, too

# Variables that `accelerate launch` sets for networks in pieces; here every process holds a whole one.
SHARDING = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism of tensors or sequences",
}
TRUE = ("true", "1", "yes", "y", "on", "t")
# Other settings of accelerate's configuration: variable, values that ask for nothing, what says it here.
UNUSED = (
    ("ACCELERATE_MIXED_PRECISION", ("", "no"), "mixed_precision", "--precision"),
    ("ACCELERATE_DYNAMO_BACKEND", ("", "no"), "dynamo_backend", "--compile"),
    ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", ("", "1"), "gradient_accumulation_steps", "--micro-batch"),
)


def announced() -> int:
    """How many processes the environment speaks of; 1 where it says nothing, or nothing sensible."""
    size = os.environ.get("WORLD_SIZE", "")
    return int(size) if "MASTER_ADDR" in os.environ and size.isdecimal() else 1


def launched() -> bool:
    """Whether `accelerate launch` or `torchrun` made this one of several processes.

    Batch systems leave MASTER_ADDR and WORLD_SIZE in the environment of processes that no launcher started;
    launchers also say which process this is.
    """
    return announced() > 1 and os.environ.get("RANK", "").isdecimal()


def check_launcher() -> None:
    """Refuse to be one of several that nobody started, or that are to hold one network in pieces.

    Raises:
        UsageError: several processes are announced, and this one has no number; or accelerate's
            configuration cuts networks into pieces.
    """
    for variable, name in SHARDING.items():
        if os.environ.get(variable, "").lower() in TRUE:
            raise UsageError(
                f"accelerate is configured for {name}, but gfprune splits batches alone, and every process "
                "holds the whole network: start it with accelerate launch --multi_gpu, or torchrun"
            )
    if announced() > 1 and not launched():
        raise UsageError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']} is set, but RANK is not: no launcher started this one. "
            "Start it with accelerate launch or torchrun, or unset WORLD_SIZE"
        )


def check_alone(command: str) -> None:
    """Refuse a command that works in one process where a launcher started several.

    Raises:
        UsageError: it did.
    """
    if launched():
        raise UsageError(
            f"{command} works in one process, and a launcher started {announced()}: leave out accelerate "
            "launch or torchrun (prune, finetune and eval take several)"
        )


def unused_settings() -> list[str]:
    """What accelerate's configuration asks for and gfprune takes from its own flags, in a sentence each."""
    return [
        f"{setting} {os.environ[variable]} of accelerate's configuration is not used: say it with {flag}"
        for variable, nothing, setting, flag in UNUSED
        if os.environ.get(variable, "").lower() not in nothing
    ]


def main_process() -> bool:
    """Whether this is the process that speaks."""
    return not launched() or os.environ.get("RANK", "0") == "0"
