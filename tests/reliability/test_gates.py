"""What the package may never do, read off its source, and what it says of its dependencies.

Ruff's security rules (`S` in pyproject.toml) come first; these are what they do not know. The look-up of
known vulnerabilities needs a network: `make audit`.
"""

import ast
import importlib.metadata
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "gfprune_cli"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
RUFF = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["ruff"]["lint"]

# pickles by any name, and processes that a value could end up in
MODULES = {
    "pickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "jsonpickle", "subprocess",
    "pty", "runpy", "code", "codeop", "ctypes", "multiprocessing", "torch.package",
    "torch.utils.cpp_extension",
}  # fmt: skip
CALLS = re.compile(
    r"(eval|exec|compile|__import__|input|breakpoint"
    r"|torch\.(load|save|hub\..*|jit\.(load|save|script)|package\..*)"
    r"|yaml\.(load|load_all|full_load|full_load_all|unsafe_load|unsafe_load_all|dump|dump_all)"
    r"|(numpy|numpy\.lib\.npyio)\.(load|fromfile|save|savez|savez_compressed)"
    r"|os\.(system|popen|exec\w+|spawn\w+|posix_spawn\w*|fork|forkpty)"
    r"|tempfile\.mktemp"
    r"|(accelerate|accelerate\.utils|torch\.distributed)\.\w*object\w*)"
)
KEYWORDS = {
    ("shell", True), ("allow_pickle", True), ("trust_remote_code", True), ("weights_only", False),
    ("safe_serialization", False), ("use_safetensors", False),
}  # fmt: skip
# (file, function, what) -> why it is right all the same
EXCEPTIONS = {
    (
        "outputs/durable.py",
        "",
        "ctypes",
    ): "renameat2, which Python does not offer: it swaps two folders at once",
    (
        "runtime/memory.py",
        "",
        "ctypes",
    ): "mallopt, which Python does not offer: memory that is let go goes back to the system",
    (
        "evaluation/inception.py",
        "pytorch_inception",
        "torch.load",
    ): "published weights, their SHA-256 is a constant and checked; weights_only",
    (
        "evaluation/inception.py",
        "custom",
        "torch.jit.load",
    ): "the TorchScript file that the user names with --inception is a program by intent",
    (
        "evaluation/quality.py",
        "statistics_bytes",
        "numpy.savez",
    ): "arrays of numbers and text, which are written as they are",
}


def findings(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(function, forbidden thing) of a module."""
    names = imported(tree)
    functions = {
        id(node): function.name
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        where = functions.get(id(node), "")
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from ((where, module) for module in modules(node) if forbidden_module(module))
        if isinstance(node, ast.Call):
            called = dotted(node.func, names)
            if CALLS.fullmatch(called):
                yield where, called
            for keyword in node.keywords:
                if isinstance(keyword.value, ast.Constant) and (keyword.arg, keyword.value.value) in KEYWORDS:
                    yield where, f"{keyword.arg}={keyword.value.value}"
                if keyword.arg == "custom_pipeline":
                    yield where, "custom_pipeline"
        if isinstance(node, ast.Attribute) and node.attr in ("__reduce__", "__reduce_ex__", "__builtins__"):
            yield where, node.attr


def modules(node: ast.Import | ast.ImportFrom) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [f"{node.module}.{alias.name}" for alias in node.names]


def forbidden_module(name: str) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in MODULES)


def imported(tree: ast.Module) -> dict[str, str]:
    """Local name -> what it stands for."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        if isinstance(node, ast.ImportFrom):
            found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return found


def dotted(node: ast.expr, names: dict[str, str]) -> str:
    """`np.load` -> "numpy.load"."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value, names)}.{node.attr}"
    return names.get(node.id, node.id) if isinstance(node, ast.Name) else ""


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def test_nothing_in_the_package_unpickles_executes_or_starts_processes() -> None:
    found = {
        (path.relative_to(PACKAGE).as_posix(), where, what)
        for path in sources()
        for where, what in findings(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert found == set(EXCEPTIONS), "new ones are refused; exceptions that are gone leave the list"


@pytest.mark.parametrize(
    ("code", "what"),
    [
        ("import pickle", "pickle"),
        ("from torch import load as read\nread('x')", "torch.load"),
        ("import torch as t\nt.load('x', weights_only=False)", "weights_only=False"),
        ("import yaml\nyaml.load('x', yaml.Loader)", "yaml.load"),
        ("import numpy as np\nnp.load('x')", "numpy.load"),
        ("import numpy as np\nnp.lib.format.read_array(f, allow_pickle=True)", "allow_pickle=True"),
        ("def f():\n    return eval('1')", "eval"),
        ("import os\nos.system('x')", "os.system"),
        ("from os import popen\npopen('x')", "os.popen"),
        ("import subprocess", "subprocess"),
        ("run('x', shell=True)", "shell=True"),
        ("P.from_pretrained('x', trust_remote_code=True)", "trust_remote_code=True"),
        ("P.from_pretrained('x', custom_pipeline=y)", "custom_pipeline"),
        ("from accelerate.utils import gather_object\ngather_object(x)", "accelerate.utils.gather_object"),
        ("from torch.utils import cpp_extension", "torch.utils.cpp_extension"),
    ],
)
def test_the_gate_sees_what_it_is_for(code: str, what: str) -> None:
    assert what in [found for _, found in findings(ast.parse(code))]


def test_ruffs_security_rules_are_on_for_the_package() -> None:
    assert "S" in RUFF["select"]
    assert [rule for rule in RUFF["ignore"] if rule.startswith("S1") or rule.startswith("S3")] == ["S101"]
    assert not any(pattern.startswith("gfprune_cli") for pattern in RUFF["per-file-ignores"])


def test_every_exception_to_a_security_rule_says_why() -> None:
    """`# noqa: S...` in the package names its rule and a reason."""
    lines = [line for path in sources() for line in path.read_text(encoding="utf-8").splitlines()]
    silenced = [line for line in lines if re.search(r"#\s*noqa\b.*\bS\d", line)]
    assert silenced
    assert [line for line in silenced if not re.search(r"# noqa: S\d{3} - \w+", line)] == []


def declared() -> list[Requirement]:
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    return [Requirement(line) for group in groups for line in group]


def lock() -> dict[str, Version]:
    lines = (ROOT / "requirements.lock.txt").read_text(encoding="utf-8").splitlines()
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): Version(version) for name, version in pins}


def extras_of_the_lock() -> set[str]:
    head = (ROOT / "requirements.lock.txt").read_text(encoding="utf-8")
    found = re.search(r"gfprune\[([\w,]+)\]", head)
    assert found
    return set(found[1].split(","))


def test_every_dependency_has_a_floor() -> None:
    """An old release with known holes must not satisfy us."""
    assert [
        str(need) for need in declared() if not any(spec.operator in (">=", "==") for spec in need.specifier)
    ] == []


def test_the_lock_satisfies_the_floors() -> None:
    pins = lock()
    bad = [
        f"{need} but {pins[canonicalize_name(need.name)]}"
        for need in declared()
        if canonicalize_name(need.name) in pins and pins[canonicalize_name(need.name)] not in need.specifier
    ]
    assert bad == []


def test_the_lock_covers_what_is_declared_and_what_that_needs() -> None:
    """Nothing is installed by `make .venv` at a version that nobody looked at."""
    pins, seen = lock(), set()
    wanted = [(Requirement(line), "") for line in PROJECT["dependencies"]]
    for extra in extras_of_the_lock():
        wanted += [(Requirement(line), "") for line in PROJECT["optional-dependencies"][extra]]
    while wanted:
        need, extra = wanted.pop()
        name = canonicalize_name(need.name)
        if need.marker and not need.marker.evaluate({"extra": extra}):
            continue
        if (name, tuple(need.extras)) in seen or name.startswith(("nvidia-", "cuda-", "triton")):
            continue
        seen.add((name, tuple(need.extras)))
        try:
            needs = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            needs = []
        for option in ("", *need.extras):
            wanted += [(Requirement(line), option) for line in needs]
    assert sorted({name for name, _ in seen} - set(pins)) == []


def test_what_the_package_imports_is_declared() -> None:
    """A transitive dependency that we import is ours to declare: its owner may drop it."""
    owners = importlib.metadata.packages_distributions()
    names = {canonicalize_name(need.name) for need in declared()}
    missing = set()
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            absolute = isinstance(node, ast.Import) or (isinstance(node, ast.ImportFrom) and not node.level)
            for module in modules(node) if absolute else []:
                top = module.split(".")[0]
                if top in sys.stdlib_module_names or top == PACKAGE.name:
                    continue
                found = {canonicalize_name(owner) for owner in owners.get(top, [top])}
                if not found & names:
                    missing.add(f"{path.relative_to(PACKAGE)}: {top} of {', '.join(sorted(found))}")
    assert missing == set()


def test_the_audit_looks_at_the_lock() -> None:
    """`make audit` asks for exactly the versions that CI installs."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    recipe = makefile.split("\naudit:")[1].split("\n\n")[0]
    assert "pip-audit" in recipe
    assert "--requirement requirements.lock.txt" in recipe
    assert "|| true" not in recipe, "a finding fails the target"
