"""Every network class of the installed diffusers is pruned, refused with a reason, or part of one pipeline.

A new release that brings another class fails here. docs/support.md lists the classes; write it with

    GFPRUNE_WRITE_SUPPORT=1 python -m pytest tests/checkpoint/test_class_list.py
"""

import os
import re
from pathlib import Path

import diffusers

from gfprune_cli.carrying.command import NAMED
from gfprune_cli.checkpoint.advice import REFUSED, why_not
from gfprune_cli.checkpoint.layout import ADDING, is_autoencoder, is_denoiser
from gfprune_cli.families.table import is_known_class

PAGE = Path(__file__).parents[2] / "docs" / "support.md"
START, END = "<!-- classes -->\n", "<!-- end of classes -->\n"
# what belongs to one pipeline, and is refused as any name that is none of the components to choose from
PARTS = re.compile(
    r"Projection|Encoder$|Embedder$|Conditioner$|Connectors?$|Head$|UpscalerBank|UpsamplerModel|UniDiffuser|"
    r"^T5Film|Proteina"
)


def networks() -> list[str]:
    """Names of all network classes that diffusers exports."""
    found = []
    for name in sorted(dir(diffusers)):
        cls = getattr(diffusers, name, None)
        if (
            isinstance(cls, type)
            and issubclass(cls, diffusers.ModelMixin)
            and cls is not diffusers.ModelMixin
        ):
            found.append(name)
    return found


def sections() -> dict[str, list[str]]:
    """How each class is treated -> the classes."""
    known, recorded = "inputs follow from the configuration", "inputs are recorded from the pipeline"
    parts, unsorted = "parts of one pipeline", "unsorted"
    refused = [f"refused: {why}" for why in REFUSED.values()]
    found: dict[str, list[str]] = {kind: [] for kind in (known, recorded, *refused, parts, unsorted)}
    for name in networks():
        if is_autoencoder(name) or is_denoiser("diffusers", name):
            found[known if is_known_class(name) else recorded].append(name)
        elif why := why_not(name):
            found[f"refused: {why}"].append(name)
        else:
            found[parts if PARTS.search(name) else unsorted].append(name)
    return found


def test_every_network_class_of_diffusers_has_its_place() -> None:
    assert sections()["unsorted"] == []


def test_what_adds_to_a_denoiser_is_pruned_or_sent_to_carry_where_carry_takes_it() -> None:
    sent = {name for name in networks() if "make it fit with gfprune carry" in (why_not(name) or "")}
    assert sent | set(ADDING) == NAMED.keys()


def test_every_denoiser_has_a_row_of_what_ran() -> None:
    """In a pipeline or alone, or of why not; `make support DIFFUSERS=CHECKOUT` adds what a release brings."""
    seen = set(re.findall(r"\| `(\w+)` \|", PAGE.read_text(encoding="utf-8").partition(START)[0]))
    denoisers = {name for name in networks() if is_denoiser("diffusers", name) and not is_autoencoder(name)}
    assert denoisers - seen == set()


def test_the_support_page_lists_them() -> None:
    rows = [
        f"| {how} | {', '.join(f'`{name}`' for name in names)} |\n"
        for how, names in sections().items()
        if names
    ]
    table = "| how | classes |\n|---|---|\n" + "".join(rows)
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    listed, _, after = rest.partition(END)
    if os.environ.get("GFPRUNE_WRITE_SUPPORT"):
        PAGE.write_text(f"{before}{START}{table}{END}{after}", encoding="utf-8")
    else:
        assert listed == table
