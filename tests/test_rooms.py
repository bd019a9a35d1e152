"""The house: every room depends on lower ones only, and no module on itself by way of others."""

import ast
from collections import defaultdict
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import gfprune_cli

PACKAGE = Path(gfprune_cli.__file__).parent
# from the lowest to the highest: each may import from those above it in this list, and from itself
ROOMS = (
    ("errors",),
    ("progress",),
    ("families", "recipes", "runtime"),
    ("outputs",),
    ("checkpoint", "diffusion"),
    ("inputs",),
    ("structure", "data"),
    ("flow",),
    ("recovery", "deploy", "evaluation"),
    ("timing",),
    ("pruning",),
    ("carrying",),
    ("pages",),
    ("api",),
    ("cli",),
)
LEVELS = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}


def imports() -> dict[str, set[str]]:
    """Module -> modules of the package that its source imports, wherever in the file."""
    modules = {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")
    }
    found: dict[str, set[str]] = {name: set() for name in modules}
    for name, path in modules.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("gfprune_cli"):
                base = (node.module or "").removeprefix("gfprune_cli").removeprefix(".")
                for alias in node.names:
                    full = f"{base}.{alias.name}".strip(".")
                    found[name].add(full if full in modules else base)
            elif isinstance(node, ast.Import):
                found[name] |= {
                    alias.name.removeprefix("gfprune_cli.")
                    for alias in node.names
                    if alias.name.startswith("gfprune_cli.")
                }
    return {name: {other for other in others if other in modules} - {name} for name, others in found.items()}


def room(module: str) -> str:
    return module.partition(".")[0]


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Names that depend on each other in turn; none if there are no such."""
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        return list(error.args[1])
    return []


def test_no_module_imports_itself_by_way_of_others() -> None:
    assert circle(imports()) == []


def test_rooms_import_from_lower_rooms_only() -> None:
    wrong = [
        f"{module} imports {other}"
        for module, others in imports().items()
        for other in others
        if room(module) != room(other)
        and module not in ("__init__", "__main__")
        and LEVELS[room(other)] >= LEVELS[room(module)]
    ]
    assert not wrong


def test_rooms_have_no_circle() -> None:
    """It holds for rooms that share a level in the table, too."""
    graph: dict[str, set[str]] = defaultdict(set)
    for module, others in imports().items():
        graph[room(module)] |= {room(other) for other in others} - {room(module)}
    assert circle(graph) == []
    assert circle({**graph, "errors": {"cli"}})  # it would be found


def test_the_folders_of_rooms_hold_no_code_of_their_own() -> None:
    for path in PACKAGE.glob("*/__init__.py"):
        assert path.read_text(encoding="utf-8") == "", path


def test_a_name_means_one_function() -> None:
    """Each command, format and page has its own by the same verb; nothing else is said twice."""
    shared = {"write", "render", "evaluate", "export", "finetune", "prune", "analyze", "carry", "asked"}
    shared |= {"default_output", "finished_run", "make_record", "result_of", "sliced"}
    homes: dict[str, list[str]] = defaultdict(list)
    for path in PACKAGE.rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                homes[node.name].append(str(path.relative_to(PACKAGE)))
    assert {name: found for name, found in homes.items() if len(found) > 1 and name not in shared} == {}
