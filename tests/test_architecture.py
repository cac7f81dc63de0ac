"""The plan of the house, held by reading the source: who may import whom, and what happens at import."""

import ast
import graphlib
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "fewbits"

# The rooms from the ground up. Imports go strictly downwards; rooms on the same floor do not know each other.
FLOORS: list[list[str]] = [
    ["names", "digest", "cache"],
    ["checks"],
    ["quantizers", "data"],
    ["layers", "streams", "models"],
    ["blocks"],
    ["convert"],
    ["calibration", "integers", "precision", "summary"],
    ["anatomy"],
    ["distill"],
    ["recipes"],
    ["training"],
    ["runs"],
    ["deploy"],
    ["report", "hub"],
    ["commands"],
    ["cli"],
    ["__main__"],
]

# Rooms that know less than their floor would allow: the only other rooms that each may import.
ONLY: dict[str, set[str]] = {"quantizers": {"names", "cache"}, "data": {"names", "cache"}, "models": {"data", "names"}}

# Rooms that must not know certain others, although those lie below them.
NEVER: dict[str, set[str]] = {"distill": {"data", "models"}, "recipes": {"data", "models"}}

# Packages that only these modules, and those inside them, may import.
CONFINED: dict[str, list[str]] = {
    "timm": ["fewbits.models.timm_models"],
    "torchvision": ["fewbits.models.timm_models", "fewbits.data"],
    "onnxruntime": ["fewbits.deploy"],
    "openvino": ["fewbits.deploy"],
    "huggingface_hub": ["fewbits.hub"],
}

# Where a confined package may be imported only when it is needed: inside a function.
LAZY: list[tuple[str, str]] = [("torchvision", "fewbits.data"), ("huggingface_hub", "fewbits.hub")]

# Rooms that import nothing else from outside than these and the standard library.
OUTSIDE: dict[str, set[str]] = {"quantizers": {"torch"}}

EXTRAS = [
    "onnx",
    "onnxruntime",
    "openvino",
    "timm",
    "torchvision",
    "huggingface_hub",
    "brevitas",
    "torchao",
    "nncf",
    "modelopt",
]


class Import(NamedTuple):
    importer: str  # dotted name of the module that imports
    imported: str  # the module, as exactly as the statement and the files allow
    where: str  # file:line
    in_function: bool


def module_name(path: Path) -> str:
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules() -> dict[str, Path]:
    return {module_name(path): path for path in sorted(SOURCE.rglob("*.py"))}


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def statements(tree: ast.AST, in_function: bool = False) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node, in_function
        yield from statements(
            node, in_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        )


def targets(node: ast.Import | ast.ImportFrom, importer: str, is_package: bool, known: set[str]) -> set[str]:
    """The modules that a statement names: `from fewbits.quantizers import base` names fewbits.quantizers.base."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    package = importer.split(".")
    package = package[: len(package) - node.level + is_package] if node.level else []
    base = ".".join([*package, *filter(None, [node.module])])
    return {f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base for alias in node.names}


@cache
def imports() -> list[Import]:
    return [
        Import(name, target, f"{path.relative_to(ROOT)}:{node.lineno}", in_function)
        for name, path in modules().items()
        for node, in_function in statements(parse(path))
        for target in sorted(targets(node, name, path.name == "__init__.py", set(modules())))
    ]


def is_inside(module: str, places: list[str]) -> bool:
    return any(module == place or module.startswith(f"{place}.") for place in places)


def room(module: str) -> str | None:
    """The room of a module of fewbits; None for the public face itself."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else None


FLOOR = {name: level for level, names in enumerate(FLOORS) for name in names}


def complaint(edge: Import) -> str | None:
    """What is wrong with one import inside fewbits, or None."""
    importer, imported = room(edge.importer), room(edge.imported)
    if importer is None or importer == imported:
        return None
    if imported is None:
        return f"{edge.where}: {importer} imports the public face, which is above every room"
    if importer not in FLOOR or imported not in FLOOR:
        return None  # test_every_room_has_a_floor says so
    if importer in ONLY and imported not in ONLY[importer]:
        return f"{edge.where}: {importer} may import {sorted(ONLY[importer]) or 'no other room'}, not {imported}"
    if imported in NEVER.get(importer, set()):
        return f"{edge.where}: {importer} must not know {imported}"
    if FLOOR[imported] >= FLOOR[importer]:
        return f"{edge.where}: {importer} imports {imported}, which is not below it"
    return None


def test_every_room_has_a_floor():
    homeless = {room(name) for name in modules()} - {None} - set(FLOOR)
    assert not homeless, f"give these a place in FLOORS: {sorted(map(str, homeless))}"


def test_imports_go_downwards():
    wrong = [text for edge in imports() if edge.imported.split(".")[0] == "fewbits" and (text := complaint(edge))]
    assert not wrong, "\n".join(wrong)


def test_no_import_cycles():
    graph: dict[str, set[str]] = {name: set() for name in modules()}
    for edge in imports():
        if edge.imported in graph:
            graph[edge.importer].add(edge.imported)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail("import cycle: " + " <- ".join(error.args[1]))


def test_confined_packages():
    wrong = []
    for edge in imports():
        package = edge.imported.split(".")[0]
        if package in CONFINED and not is_inside(edge.importer, CONFINED[package]):
            wrong.append(f"{edge.where}: {package} belongs to {CONFINED[package]}")
        if not edge.in_function and any(package == name and is_inside(edge.importer, [place]) for name, place in LAZY):
            wrong.append(f"{edge.where}: import {package} inside the function that needs it")
    assert not wrong, "\n".join(wrong)


def test_what_a_room_takes_from_outside():
    allowed = {name: packages | sys.stdlib_module_names | {"fewbits"} for name, packages in OUTSIDE.items()}
    wrong = [
        f"{edge.where}: {edge.imported}"
        for edge in imports()
        if (name := room(edge.importer)) in OUTSIDE and edge.imported.split(".")[0] not in allowed[str(name)]
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("importer", "imported", "right"),
    [
        ("fewbits.layers", "fewbits.quantizers.base", True),
        ("fewbits.quantizers.lsq", "fewbits.quantizers.base", True),
        ("fewbits.models.resnet", "fewbits.data.normalisation", True),
        ("fewbits.quantizers.lsq", "fewbits.layers", False),
        ("fewbits.quantizers.lsq", "fewbits.data", False),
        ("fewbits.data.cifar", "fewbits.models", False),
        ("fewbits.models.resnet", "fewbits.quantizers", False),
        ("fewbits.recipes.qfd", "fewbits.models", False),
        ("fewbits.deploy.onnx", "fewbits.runs", True),
        ("fewbits.runs", "fewbits.deploy.onnx", False),
        ("fewbits.cli", "fewbits", False),
        ("fewbits", "fewbits.cli", True),
    ],
)
def test_the_rule_itself(importer: str, imported: str, right: bool):
    assert (complaint(Import(importer, imported, "here:1", False)) is None) == right


def test_relative_imports_are_resolved():
    known = {"fewbits.quantizers", "fewbits.quantizers.base", "fewbits.layers"}
    from_sibling, from_above = ast.parse("from .base import Codes\nfrom .. import layers").body
    assert isinstance(from_sibling, ast.ImportFrom)
    assert isinstance(from_above, ast.ImportFrom)
    assert targets(from_sibling, "fewbits.quantizers.lsq", False, known) == {"fewbits.quantizers.base"}
    assert targets(from_sibling, "fewbits.quantizers", True, known) == {"fewbits.quantizers.base"}
    assert targets(from_above, "fewbits.quantizers.lsq", False, known) == {"fewbits.layers"}


def test_public_face_holds_imports_and_all_only():
    wrong = []
    for index, node in enumerate(parse(SOURCE / "__init__.py").body):
        match node:
            case ast.Import() | ast.ImportFrom():
                continue
            case ast.Expr(value=ast.Constant(value=str())) if index == 0:
                continue
            case ast.Assign(targets=[ast.Name(id="__all__" | "__version__")]):
                continue
            case ast.AnnAssign(target=ast.Name(id="__all__" | "__version__")):
                continue
        wrong.append(f"src/fewbits/__init__.py:{node.lineno}: {ast.unparse(node)[:80]}")
    assert not wrong, "\n".join(wrong)


def test_public_names():
    fewbits = importlib.import_module("fewbits")
    assert fewbits.__all__ == sorted(set(fewbits.__all__))
    missing = [name for name in fewbits.__all__ if not hasattr(fewbits, name)]
    assert not missing, f"in __all__, but not importable: {missing}"


def test_no_rooms_for_odds_and_ends():
    odd = {"utils", "util", "common", "helpers", "helper", "misc"}
    wrong = [str(path.relative_to(ROOT)) for path in SOURCE.rglob("*") if path.stem in odd]
    assert not wrong, f"name these after the one idea they hold: {wrong}"


def test_nothing_happens_at_import():
    code = f"""
import importlib, socket, sys

def refuse(*args, **kwargs):
    print("network at import:", args)
    raise OSError("no network at import")

socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = socket.create_connection = refuse
for name in {[name for name in modules() if not name.endswith("__main__")]!r}:
    importlib.import_module(name)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=SOURCE.parent, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_public_face_needs_no_extra():
    code = f"""
import sys
sys.modules.update(dict.fromkeys({EXTRAS!r}))  # None there means: importing it raises ModuleNotFoundError
import fewbits
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=SOURCE.parent, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_no_machine_paths_in_tracked_files():
    listed = subprocess.run(["git", "ls-files", "-z"], capture_output=True, text=True, cwd=ROOT, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    machine_path = re.compile(r"(?<![\w.~}<*-])/(?:work|root|tmp|home|Users)\b")
    wrong = []
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        content = path.read_bytes() if path.is_file() else b""
        if b"\0" in content[:8192]:
            continue  # a picture or an archive
        for number, line in enumerate(content.decode("utf-8", errors="replace").splitlines(), start=1):
            wrong.extend(f"{name}:{number}: {found.group()}" for found in machine_path.finditer(line))
    assert not wrong, "\n".join(wrong)
