"""The commands: parse, call, render. What a command takes stands in its recipe and in `RunOptions`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gfprune_cli.cli.environment import importing
from gfprune_cli.cli.options import with_options
from gfprune_cli.cli.pages import check_page, write_page
from gfprune_cli.cli.session import Session
from gfprune_cli.errors import GateMissed, UsageError
from gfprune_cli.recipes.analyze import AnalyzeRecipe
from gfprune_cli.recipes.carry import CarryRecipe
from gfprune_cli.recipes.evaluate import EvalRecipe
from gfprune_cli.recipes.export import ExportRecipe
from gfprune_cli.recipes.finetune import FinetuneRecipe
from gfprune_cli.recipes.options import ALL, option_names, resolve_recipe
from gfprune_cli.recipes.prune import PruneRecipe
from gfprune_cli.recipes.run_options import RunOptions
from gfprune_cli.runtime.launch import check_alone, check_launcher, main_process

if TYPE_CHECKING:
    from gfprune_cli.evaluation.result import EvalResult


@contextmanager
def asked(
    recipe: type, flags: dict[str, Any], check: Callable[[], None] | None = None
) -> Iterator[tuple[Session, Any, RunOptions]]:
    """The terminal, and what the flags say; errors end the process with their code.

    Args:
        check: see `Session`.
    """
    printing = {name: flags[name] for name in ("json", "quiet", "debug")}
    with Session(**printing, offline=bool(flags["offline"]), check=check) as session:
        settings = {name: flags[name] for name in option_names(recipe)}
        run = {name: value for name, value in flags.items() if name in option_names(RunOptions)}
        yield session, resolve_recipe(recipe, flags.get("config"), settings), RunOptions.resolve(**run)


@with_options(AnalyzeRecipe)
def run_analyze(**flags: Any) -> None:
    """Show channel groups, their cost, and what each sparsity would leave.

    Reads only configuration and safetensors headers, unless --sensitivity is given.
    """
    with asked(AnalyzeRecipe, flags) as (session, recipe, options):
        with importing():
            from gfprune_cli.cli.tables import analysis_text
            from gfprune_cli.pruning.analyze import Analyses, analyze

        if options.html is not None:
            check_one(recipe.component)
            check_page(options.html, force=options.force)
        found = analyze(recipe, options, session.progress)
        if options.html is not None:
            from gfprune_cli.pages.analysis_page import render

            write_page(options.html, render(found.document()))
            session.note(f"wrote {options.html}")
        if isinstance(found, Analyses):
            text = "\n\n".join(f"{one.component}\n{analysis_text(one)}" for one in found.networks)
        else:
            text = analysis_text(found)
        session.result(found.document(), text)


def check_one(component: str | None) -> None:
    """Refuse a page about every denoiser of a pipeline."""
    if component == ALL:
        raise UsageError("--html shows one component of a pipeline: name it with --component")


def refuse_several(recipe: PruneRecipe, options: RunOptions) -> None:
    """Refuse what prune does in one process alone, where a launcher started several.

    Raises:
        UsageError: in the first; the others end in peace: launchers stop it when another one fails.
    """
    wanted = {
        "prune --speedup or --latency": recipe.timed,
        "prune --component all": recipe.component == ALL,
        "prune --html": options.html is not None,
    }
    try:
        for what in (what for what, asked in wanted.items() if asked):
            check_alone(what)
    except UsageError:
        if main_process():
            raise
        raise SystemExit(0) from None


@with_options(PruneRecipe)
def run_prune(**flags: Any) -> None:
    """Prune a checkpoint: score, mask softly, refit, remove channels, recover, write safetensors.

    Prints the path of the result (one for each --sparsity), or one JSON document with --json.
    """
    with asked(PruneRecipe, flags, check_launcher) as (session, recipe, options):
        refuse_several(recipe, options)
        with importing():
            from gfprune_cli.cli.tables import networks_table, prune_table
            from gfprune_cli.pruning.command import prune
            from gfprune_cli.pruning.result import PruneResult

        if options.html is not None:
            check_one(recipe.component)
            if options.dry_run:
                raise UsageError("--html has nothing to show of a --dry-run: drop one of the two")
            check_page(options.html, force=options.force or options.resume)
        result = prune(recipe, options, session.progress)
        networks = (result,) if isinstance(result, PruneResult) else result.networks
        if options.html is not None:
            from gfprune_cli.pages.networks_page import render
            from gfprune_cli.pruning.showing import evaluate_networks

            found = evaluate_networks(networks, recipe, options, session.progress)
            page = render(
                [network.document() for network in networks],
                [one.document() for one in found],
                [one.grid for one in found],
            )
            write_page(options.html, page)
            session.note(f"wrote {options.html}")
        session.show(prune_table(networks[0]) if len(networks) == 1 else networks_table(networks))
        outputs = dict.fromkeys(network.output or "" for network in networks)
        session.result(result.document(), "\n".join(outputs))


@with_options(FinetuneRecipe)
def run_finetune(**flags: Any) -> None:
    """Bring the quality of a pruned checkpoint back, with the dense model as teacher.

    Prints the path of the result, or one JSON document with --json.
    """
    with asked(FinetuneRecipe, flags, partial(check_launcher, shards=True)) as (session, recipe, options):
        with importing():
            from gfprune_cli.cli.tables import finetune_table
            from gfprune_cli.recovery.command import finetune

        result = finetune(recipe, options, session.progress)
        session.show(finetune_table(result))
        session.result(result.document(), result.output or "")


@with_options(ExportRecipe)
def run_export(**flags: Any) -> None:
    """Write a checkpoint, dense or pruned, as a deployable artefact, verified against the source.

    Prints the path of the result, or one JSON document with --json. Exit code 3: the error is above
    --tolerance, and nothing was written.
    """
    with asked(ExportRecipe, flags, partial(check_alone, "export")) as (session, recipe, options):
        with importing():
            from gfprune_cli.cli.tables import export_table
            from gfprune_cli.deploy.command import export

        result = export(recipe, options, session.progress)
        session.show(export_table(result))
        session.result(result.document(), result.output or "")


@with_options(EvalRecipe)
def run_eval(**flags: Any) -> None:
    """Evaluate a checkpoint: quality, consistency with its dense original, speed and size.

    Prints a Markdown report, or one JSON document with --json. Exits with 3 if a gate is missed.
    """
    with asked(EvalRecipe, flags, check_launcher) as (session, recipe, options):
        with importing():
            from gfprune_cli.evaluation.command import continues, evaluate

        check_pages(options, own=options.resume and continues(recipe, options))
        result = evaluate(recipe, options, session.progress, publisher(session, options))
        if result is not None and result.missed:
            raise GateMissed(
                "; ".join(f"--{g.name} {g.limit:g} was missed with {g.value}" for g in result.missed)
            )


def check_pages(options: RunOptions, *, own: bool) -> None:
    """Refuse, before the work, pages that cannot be written.

    Args:
        own: whether what stands there is of the run that is continued.
    """
    pages = {"--html": options.html, "--markdown": options.markdown, "--save-stats": options.save_stats}
    for name, path in pages.items():
        if path is not None and main_process():
            check_page(path, force=options.force or own, flag=name)
    files = [path.resolve() for path in pages.values() if path is not None]
    if len(set(files)) < len(files):
        raise UsageError("--html, --markdown and --save-stats name the same file: name different ones")


def publisher(session: Session, options: RunOptions) -> "Callable[[EvalResult], None]":
    """What shows the result of an evaluation, while its samples are still kept."""
    from gfprune_cli.cli.tables import eval_table
    from gfprune_cli.pages.evaluation_page import markdown, render

    def write(path: Path | None, page: str) -> None:
        if path is not None:
            write_page(path, page)
            session.note(f"wrote {path}")

    def publish(result: "EvalResult") -> None:
        document = result.document()
        if options.html is not None:
            write(options.html, render(document, list(result.grid)))
        write(options.markdown, markdown(document))
        if session.json:
            session.show(eval_table(document))
        session.result(document, markdown(document).rstrip("\n"))

    return publish


@with_options(CarryRecipe)
def run_carry(**flags: Any) -> None:
    """Make an adapter of the dense model fit the pruned one: the rows, columns and blocks that are left.

    Prints the path of the result, or one JSON document with --json.
    """
    with asked(CarryRecipe, flags) as (session, recipe, options):
        with importing():
            from gfprune_cli.carrying.command import carry
            from gfprune_cli.cli.tables import carry_table

        result = carry(recipe, options, session.progress)
        session.show(carry_table(result))
        session.result(result.document(), result.output or "")


COMMANDS: dict[str, Callable[..., None]] = {
    "analyze": run_analyze,
    "prune": run_prune,
    "finetune": run_finetune,
    "export": run_export,
    "eval": run_eval,
    "carry": run_carry,
}
