"""Every network class of the installed diffusers is pruned, or is of a kind that is not, for a reason.

A new release that brings a class of another kind fails here. docs/support.md lists the classes; write it with

    GFPRUNE_WRITE_SUPPORT=1 python -m pytest tests/checkpoint/test_class_list.py
"""

import os
import re
from pathlib import Path

import diffusers

from gfprune_cli.checkpoint.layout import is_autoencoder, is_denoiser
from gfprune_cli.families.table import is_known_class

PAGE = Path(__file__).parents[2] / "docs" / "support.md"
START, END = "<!-- classes -->\n", "<!-- end of classes -->\n"
# what is no denoiser, by what the name says
KINDS = {
    "networks that add to a denoiser's states": r"ControlNet|Adapter$",
    "autoencoders of videos and sounds, and those that are not pruned": (
        r"Autoencoder|Vae$|VAE$|Decoder(Model)?$|Vocoder|Detokenizer|Tokenizer$"
    ),
    "parts of one pipeline": (
        r"Projection|Encoder$|Embedder$|Conditioner$|Connectors?$|Head$|UpscalerBank|UpsamplerModel|UniDiffuser"
    ),
}


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
    found: dict[str, list[str]] = {known: [], recorded: [], **{kind: [] for kind in KINDS}, "unsorted": []}
    for name in networks():
        if is_autoencoder(name) or is_denoiser("diffusers", name):
            found[known if is_known_class(name) else recorded].append(name)
        else:
            kinds = [kind for kind, pattern in KINDS.items() if re.search(pattern, name)]
            found[kinds[0] if kinds else "unsorted"].append(name)
    return found


def test_every_network_class_of_diffusers_has_its_place() -> None:
    assert sections()["unsorted"] == []


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
