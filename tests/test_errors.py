"""Messages name options in the words of the caller: flags on the command line, arguments in Python."""

from collections.abc import Callable
from contextvars import Context
from pathlib import Path

import pytest

import gfprune_cli
from gfprune_cli.errors import GfpruneError, UsageError, flags, named


def said(call: Callable[[], object]) -> str:
    """What a Python caller is told, whose context knows of no command line."""
    with pytest.raises(GfpruneError) as error:
        Context().run(call)
    return str(error.value)


def test_python_callers_read_arguments() -> None:
    assert said(lambda: gfprune_cli.prune("demo", sparsity=2)).startswith("sparsity 2: ")
    assert said(lambda: gfprune_cli.prune("nowhere")).startswith("model 'nowhere': no such folder")
    message = said(lambda: gfprune_cli.export("demo", as_variant=True, dtype="fp32"))
    assert message.startswith("as_variant is for dtype fp16 or bf16")


def test_a_word_that_is_almost_right_is_named() -> None:
    assert "did you mean 'sparsity'?" in said(lambda: gfprune_cli.prune("demo", sparsty=0.5))
    assert "did you mean 'taylor'?" in said(lambda: gfprune_cli.prune("demo", criterion="tailor"))
    assert "did you mean" not in said(lambda: gfprune_cli.prune("demo", criterion="x"))


def test_a_checkpoint_goes_by_the_name_that_the_caller_gave_it() -> None:
    def resolve() -> None:
        with named(model="teacher", revision="teacher_revision"):
            raise UsageError("--model 'x': no such folder; --revision is for the Hub, --variant is not")

    assert said(resolve) == "teacher 'x': no such folder; teacher_revision is for the Hub, variant is not"
    with flags(), pytest.raises(UsageError, match=r"^--teacher 'x'.*--teacher-revision is .*, --variant is"):
        resolve()


def test_names_of_the_user_are_left_alone(tmp_path: Path) -> None:
    def fail() -> None:
        raise GfpruneError(f"{tmp_path}/--data/a--model, '--seed' and x--y cannot be read")

    assert said(fail).endswith("/--data/a--model, '--seed' and x--y cannot be read")
