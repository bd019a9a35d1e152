"""Whether a launcher started this process as one of several; light enough to ask before torch is imported."""

import os
import threading

from gfprune_cli.errors import UsageError

joined = threading.Event()  # the other processes are there: signals are theirs, too

# Variables that `accelerate launch` sets for networks in pieces: `finetune` takes FSDP 2; else every process
# holds a whole one.
FSDP = "ACCELERATE_USE_FSDP"
SHARDING = {
    FSDP: "FSDP",
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
    ("FSDP_ACTIVATION_CHECKPOINTING", ("", "false"), "fsdp_activation_checkpointing", "--checkpointing"),
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


def wanted(variable: str) -> bool:
    """Whether accelerate's configuration asks for it."""
    return os.environ.get(variable, "").lower() in TRUE


def sharding() -> bool:
    """Whether accelerate is configured to keep one network in pieces on several processes."""
    return launched() and wanted(FSDP)


def check_launcher(*, shards: bool = False) -> None:
    """Refuse to be one of several that nobody started, or that are to hold one network in pieces.

    Args:
        shards: whether the command can work with a network in pieces, as FSDP 2 makes them.

    Raises:
        UsageError: several processes are announced, and this one has no number; or accelerate's
            configuration cuts networks into pieces in a way that the command does not know.
    """
    for variable, name in SHARDING.items():
        if wanted(variable) and not (shards and variable == FSDP):
            other = ", or --use_fsdp --fsdp_version 2" if shards else ", or torchrun"
            raise UsageError(
                f"accelerate is configured for {name}, but every process holds the whole network here: start "
                f"it with accelerate launch --multi_gpu{other}"
            )
    if shards and wanted(FSDP):
        check_fsdp()
    if announced() > 1 and not launched():
        raise UsageError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']} is set, but RANK is not: no launcher started this one. "
            "Start it with accelerate launch or torchrun, or unset WORLD_SIZE"
        )


def check_fsdp() -> None:
    """Refuse settings of FSDP that `finetune` does not know.

    Raises:
        UsageError: its first version, or weights in main memory.
    """
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise UsageError("accelerate is configured for FSDP 1: start it with --use_fsdp --fsdp_version 2")
    if wanted("FSDP_OFFLOAD_PARAMS"):
        raise UsageError(
            "fsdp_offload_params of accelerate's configuration keeps weights in main memory, which finetune "
            "does not: leave it out"
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
