"""How a command runs: what does not decide the bytes of its output, each flag once."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, get_type_hints

from annotated_types import Ge

from gfprune_cli.recipes.options import Help, flag, validated


@dataclass(frozen=True)
class Of:
    """Which commands have an option, as words; `only_cli`: they have it on the command line only."""

    commands: str
    only_cli: bool = False


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Where a command reads and writes, and on what it computes.

    A field is a flag of the commands that `Of` names, and an argument of their Python functions.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    html: Annotated[
        Path | None,
        Help(
            "Also write a self-contained page.",
            {"prune": "Also draw from each network, time it, and write a page that helps to choose."},
        ),
        Of("analyze prune eval", only_cli=True),
    ] = None
    times_out: Annotated[
        Path | None,
        Help("Also measure the network here and write its times to this file, for --times."),
        Of("analyze"),
    ] = None
    markdown: Annotated[Path | None, Help("Also write Markdown."), Of("eval", only_cli=True)] = None
    out: Annotated[
        Path | None,
        Help(
            "Output folder (default: named after model and settings).",
            {
                "prune": "Output folder (default: named after model and settings); OUT-0.3, ... of several.",
                "eval": "Also write the samples as PNG files in this folder.",
            },
        ),
        Of("prune finetune eval export carry"),
    ] = None
    save_stats: Annotated[
        Path | None, Help("Also write the statistics of --data to this .npz."), Of("eval")
    ] = None
    resume: Annotated[
        bool, Help("Continue an interrupted run, if there is one."), Of("prune finetune eval")
    ] = False
    force: Annotated[
        bool,
        Help(
            "Replace an output that exists, and discard saved state.",
            {"analyze": "Replace the --html and --times-out files if they exist."},
        ),
        Of("analyze prune finetune eval export carry"),
    ] = False
    dry_run: Annotated[bool, Help("Show the plan and write nothing."), Of("prune finetune export carry")] = (
        False
    )
    save_every: Annotated[
        int, Ge(0), Help("Steps between saved states; 0: only when stopped."), Of("finetune")
    ] = 100
    sample_every: Annotated[int, Ge(0), Help("Steps between grids of samples; 0: none."), Of("finetune")] = (
        100
    )
    logs: Annotated[
        Path | None, Help("Folder of metrics and samples (default: OUT-logs)."), Of("finetune")
    ] = None
    logger: Annotated[
        Literal["tensorboard", "trackio"] | None, Help("Also log to this, if installed."), Of("finetune")
    ] = None
    offline: Annotated[
        bool, Help("Never use the network."), Of("analyze prune finetune eval export carry")
    ] = False
    device: Annotated[
        str | None, Help("Torch device (default: CUDA if there is one)."), Of("analyze prune finetune eval")
    ] = None
    offload_teacher: Annotated[
        bool, Help("Keep the dense model in main memory while the device trains."), Of("prune finetune")
    ] = False

    @classmethod
    def names(cls, command: str, *, cli: bool = True) -> list[str]:
        """The options of a command, in the order of its help.

        Args:
            cli: those that only the command line has, too.
        """
        hints = get_type_hints(cls, include_extras=True)
        found = []
        for field in fields(cls):
            of = next(part for part in hints[field.name].__metadata__ if isinstance(part, Of))
            if command in of.commands.split() and (cli or not of.only_cli):
                found.append(field.name)
        return found

    @classmethod
    def resolve(cls, **given: Any) -> Self:
        """Options from flags or arguments, those that are None left at their defaults; `~` is expanded.

        Raises:
            UsageError: a value out of range, named as the flag that sets it.
        """
        values = {name: value for name, value in given.items() if value is not None}
        found = validated(cls, values, flag)
        paths = {name: value.expanduser() for name, value in vars(found).items() if isinstance(value, Path)}
        return cls(**vars(found) | paths)
