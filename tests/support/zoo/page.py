"""The tables of docs/support.md about the pipelines of diffusers' tests, and about networks without one."""

import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import diffusers

PAGE = Path(__file__).parents[3] / "docs" / "support.md"
Found = dict[str, dict[str, Any]]
COLUMNS = ("class", "pipeline", "groups", "prune", "exact at another", "finetune", "diffusers", "export")
KINDS = ("size", "frames", "text")
ADDING = re.compile(r"ControlNet|Adapter$")


def counts(found: Found) -> str:
    """How many pipelines and classes passed."""
    runs = {name: row for name, row in found.items() if row["status"] != "unbuilt"}
    pipelines, classes = defaultdict(list), defaultdict(list)
    for name, row in runs.items():
        pipelines[name.partition("/")[0]].append(row["status"] == "passed")
        classes[row["class"]].append(row["status"] == "passed")
    kinds = Counter(row["status"] for row in runs.values())
    return (
        f"{sum(map(all, pipelines.values()))} of {len(pipelines)} pipelines and "
        f"{sum(map(any, classes.values()))} of {len(classes)} classes pass; "
        f"{', '.join(f'{count} {kind}' for kind, count in sorted(kinds.items()))}; "
        f"{len(found) - len(runs)} pipelines could not be built"
    )


def write(found: Found, checkout: Path, *, bare: bool = False) -> None:
    """Put the tables in their place, with the version of the tests that they are about."""
    part, made = ("bare folders", bare_table) if bare else ("pipelines", table)
    start, end = f"<!-- {part} -->\n", f"<!-- end of {part} -->\n"
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(start)
    _, _, after = rest.partition(end)
    PAGE.write_text(f"{before}{start}{versions(checkout)}: {made(found)}{end}{after}", encoding="utf-8")


def unseen_first(names: list[str]) -> list[str]:
    """In order, but what has a row of its own on the page comes last."""
    text = PAGE.read_text(encoding="utf-8")
    return sorted(names, key=lambda name: f"| `{name}` |" in text)


def versions(checkout: Path) -> str:
    """Of diffusers and of its tests."""
    told = re.search(r'version="([^"]+)"', (checkout / "setup.py").read_text(encoding="utf-8"))
    return f"diffusers {diffusers.__version__}, tests of {told[1] if told else 'an unknown version'}"


def table(found: Found) -> str:
    """One row for each class, then what is refused and what could not be built, with the reasons."""
    runs = {name: row for name, row in found.items() if row["status"] != "unbuilt"}
    by_class: dict[str, list[tuple[str, dict[str, Any]]]] = defaultdict(list)
    for name, row in sorted(runs.items()):
        by_class[row["class"]].append((name, row))
    lines = [f"{counts(found)}.", ""]
    lines += [f"| {' | '.join(COLUMNS)} | other pipelines that prune |", "|---" * (len(COLUMNS) + 1) + "|"]
    for kind, rows in sorted(by_class.items()):
        passed = [(name, row) for name, row in rows if row["status"] == "passed"]
        if not passed:
            continue
        name, row = next((one for one in passed if one[1].get("whole")), passed[0])
        others = [other for other, _ in passed if other != name]
        seen = [row.get(column, "") for column in ("finetune", "diffusers", "export")]
        seen[-1] = reason({"error": row.get("broke", seen[-1])})
        elsewhere = ", ".join(kind for kind in KINDS if kind in row.get("exact", ()))
        cells = [f"`{kind}`", named(name), row.get("groups", ""), f"{row['prune']:.1%}", elsewhere, *seen]
        lines.append(f"| {' | '.join(map(str, cells))} | {', '.join(map(named, others))} |")
    lines += ["", "| pipeline | class | why it is refused |", "|---|---|---|"]
    refused = [(name, row) for name, row in sorted(runs.items()) if row["status"] != "passed"]
    lines += [f"| {named(name)} | `{row['class']}` | {reason(row)} |" for name, row in refused]
    unbuilt = [(name, row) for name, row in sorted(found.items()) if row["status"] == "unbuilt"]
    lines += ["", "| pipeline, or tests | why it could not be built |", "|---|---|"] if unbuilt else []
    lines += [f"| {name} | {reason(row)} |" for name, row in unbuilt]
    return "\n".join(lines) + "\n"


def bare_counts(found: Found) -> str:
    """How many denoisers passed, apart from what adds to one."""
    kinds = Counter("beside" if ADDING.search(name) else row["status"] for name, row in found.items())
    beside = kinds.pop("beside", 0)
    told = [f"{count} {kind}" for kind, count in sorted(kinds.items()) if kind != "passed"]
    told.append(f"{beside} classes add to a denoiser")
    return f"{kinds['passed']} of {kinds.total()} denoiser classes pass; {', '.join(told)}"


def bare_table(found: Found) -> str:
    """One row for each class that passed, then the others, with the reasons."""
    rows = sorted(found.items())
    lines = [f"{bare_counts(found)}.", "", "| class | groups | prune | diffusers |", "|---|---|---|---|"]
    for name, row in rows:
        if row["status"] == "passed":
            lines.append(f"| `{name}` | {row['groups']} | {row['prune']:.1%} | {row['diffusers']} |")
    lines += ["", "| class | why it is not pruned alone |", "|---|---|"]
    lines += [f"| `{name}` | {reason(row)} |" for name, row in rows if row["status"] != "passed"]
    return "\n".join(lines) + "\n"


def named(name: str) -> str:
    """The pipeline, with the component where it is no usual one."""
    pipeline, _, component = name.partition("/")
    return pipeline if component in ("unet", "transformer") else f"{pipeline} ({component})"


def reason(row: dict[str, Any]) -> str:
    """The one line, without the folder of the run."""
    words = [Path(word).name if word.startswith("/") else word for word in str(row.get("error", "")).split()]
    return " ".join(words).replace("|", "\\|")
