"""What travels with an export: `gfprune.json` and the model card."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from gfprune_cli.checkpoint.card import inherited, lineage
from gfprune_cli.checkpoint.component import Component
from gfprune_cli.checkpoint.record import (
    SCHEMA_VERSION,
    about,
    installed_tools,
    installed_version,
    read_document,
)
from gfprune_cli.checkpoint.source import Source
from gfprune_cli.deploy.formats import FORMATS
from gfprune_cli.recipes.export import ExportRecipe


def export_record(
    source: Source,
    component: Component,
    hashes: Mapping[str, str],
    recipe: ExportRecipe,
    details: Mapping[str, Any],
) -> dict[str, Any]:
    """The source's own record, if it has one, plus the key `export`.

    Args:
        hashes: SHA-256 of the source's weight files, by name.
        details: what the export itself knows (files, inputs, parity, ...).

    Raises:
        GfpruneError: the source's record is damaged.
    """
    base, origin = read_document(component.root), source.origin(hashes)
    if base is not None:
        base = about(base, component.name)
    else:  # a dense checkpoint: nothing was pruned
        base = {
            "schema_version": SCHEMA_VERSION,
            "command": "export",
            "source": origin,
            "class_name": component.class_name,
            "component": component.name,
            "kept": {},
        }
    runtimes = {name: installed_version(name) for name in FORMATS[recipe.format].packages}
    entry = {
        "recipe": recipe.document(),
        "model": origin,
        "class_name": component.class_name,
        **details,
        "tools": installed_tools() | runtimes,
    }
    return {**base, "export": entry}


def base_model(record: Mapping[str, Any]) -> str | None:
    """The Hub id that everything goes back to, if it does."""
    for origin in (record.get("source"), record["export"]["model"]):
        if isinstance(origin, dict) and origin.get("kind") == "hub":
            return str(origin.get("label"))
    return None


def write_export_card(path: Path, *, root: Path, loading: str, record: Mapping[str, Any]) -> None:
    """Write README.md: front matter for the Hub, how to load the artefact, how far it is from its source.

    Args:
        root: the source checkpoint, whose licence is inherited.
        loading: the code that loads the artefact.
        record: the document that `gfprune.json` holds.
    """
    entry = record["export"]
    recipe, parity = entry["recipe"], entry["parity"]
    pruned = "sparsity" in record
    front: dict[str, Any] = {
        **inherited(root),
        "tags": ["gfprune", *(["pruned"] if pruned else []), recipe["format"]],
    }
    library = FORMATS[recipe["format"]].library
    if library:
        front["library_name"] = library
    base = base_model(record)
    front |= lineage(base, (record,))
    name = base or entry["class_name"]
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=True).strip(),
        "---",
        "",
        f"# {name}{', pruned' if pruned else ''}: {recipe['format']}, {recipe['dtype']}",
        "",
        f"Exported by gfprune. On {parity['inputs']} seeded inputs the outputs differ from the source's in "
        f"float32 by at most {parity['max_abs']:.3g}, {parity['max_rel']:.3g} of the largest output.",
        "",
        "```python",
        loading,
        "```",
        *input_table(entry.get("inputs")),
        *pruning_table(record),
        "",
        "The resolved recipes and where the weights come from are in `gfprune.json`.",
        "",
    ]
    path.write_text("\n".join(lines), encoding="utf-8")


def input_table(inputs: Mapping[str, Any] | None) -> list[str]:
    """The inputs of a graph, as rows of Markdown."""
    if inputs is None:
        return []
    rows = [
        f"| `{name}` | {entry['dtype']} | {' x '.join(map(str, entry['shape']))} |"
        for name, entry in inputs.items()
    ]
    return ["", "| input | type | shape |", "|---|---|---|", *rows]


def pruning_table(record: Mapping[str, Any]) -> list[str]:
    """What pruning took, where the source is a pruned checkpoint of ours."""
    rows = []
    for key, title in (("params", "parameters"), ("macs", "multiply-accumulates")):
        pair = record.get(key)
        if isinstance(pair, dict) and {"before", "after"} <= pair.keys():
            rows.append(f"| {title} | {pair['before']:,} | {pair['after']:,} |")
    return ["", "| | dense | pruned |", "|---|---|---|", *rows] if rows else []
