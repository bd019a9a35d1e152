"""A flag that another one leaves without effect is a wrong use, said in one line before anything is read.

pytest tests/test_idle_flags.py
"""

from pathlib import Path

import pytest
from typer.testing import CliRunner

import gfprune_cli
from gfprune_cli.cli.main import app
from gfprune_cli.errors import UsageError


@pytest.mark.parametrize(
    ("command", "cause", "idle"),
    [
        ("prune", "--one-shot", "--iterations 5"),
        ("prune", "--one-shot", "--bound 0.2"),
        ("prune", "--layout native", "--align 8"),
        ("prune", "--sparsity 0", "--recover 8"),
        ("eval", "--no-latency", "--compile"),
        ("eval", "--no-latency", "--deepcache"),
        ("eval", "--no-latency", "--latency-batches 1"),
    ],
)
def test_flags_without_effect_are_refused(command: str, cause: str, idle: str) -> None:
    arguments = [command, "--model", "nowhere", *cause.split(), *idle.split()]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2
    assert done.stderr == f"error: {idle.split()[0]} has no effect with {cause}: drop one of the two\n"


def test_in_recipe_files_and_from_python_as_well(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: nowhere\none_shot: true\n")
    done = CliRunner().invoke(app, ["prune", "--config", str(recipe), "--iterations", "2"])
    assert (done.exit_code, "--one-shot" in done.stderr) == (2, True)
    with pytest.raises(UsageError, match="--iterations has no effect"):
        gfprune_cli.prune("nowhere", one_shot=True, iterations=2)


def test_what_says_the_default_again_is_no_contradiction(tmp_path: Path) -> None:
    """Recipes in records hold every setting."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: nowhere\none_shot: true\niterations: 1\nbound: 0.5\n")
    done = CliRunner().invoke(app, ["prune", "--config", str(recipe)])
    assert "nowhere" in done.stderr
