"""`python -m gfprune_cli` is `gfprune`."""

from gfprune_cli.cli.main import run

run()
