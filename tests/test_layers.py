"""The layers of the package: imports point one way, ``__all__`` is complete, and importing is cheap."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import surgery

ROOT = Path(surgery.__file__).parent
# Lower rooms first; a module may import modules of its own room and of those below.
_ROWS = (
    "text errors system files.guard algebra solvers factorizations sites kinds",
    "data plans cost files runtime passes training report cli",
)
ROOMS = [room for row in _ROWS for room in row.split()]
TESTS = sorted(Path(__file__).parent.glob("*.py"))
MODULES = [m.name for m in pkgutil.walk_packages([str(ROOT)], "surgery.") if not m.name.endswith("__main__")]


def _room(module: str) -> str:
    path = module.removeprefix("surgery.")
    return next(room for room in sorted(ROOMS, key=len, reverse=True) if f"{path}.".startswith(f"{room}."))


def _imports(path: Path) -> set[str]:
    found = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    names = {f"{node.module}.{alias.name}" for node in found for alias in node.names}
    return {_room(name) for name in names if name.startswith("surgery.") and name.count(".") > 1}


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    if path.parent == ROOT and path.stem in ("__init__", "__main__"):
        return
    own = _room(".".join(["surgery", *path.relative_to(ROOT).with_suffix("").parts]))
    above = {room for room in _imports(path) if ROOMS.index(room) > ROOMS.index(own)}
    assert not above, f"{own} imports from rooms above it: {sorted(above)}"


@pytest.mark.parametrize("name", MODULES)
def test_all_is_complete(name: str) -> None:
    module = importlib.import_module(name)
    if not hasattr(module, "__all__"):
        assert not [n for n, v in vars(module).items() if getattr(v, "__module__", None) == name and n[0] != "_"]
        return
    own = {n for n, v in vars(module).items() if getattr(v, "__module__", None) == name and not n.startswith("_")}
    assert own <= set(module.__all__), f"not in __all__: {sorted(own - set(module.__all__))}"
    assert all(hasattr(module, n) for n in module.__all__)


def test_type_checkers_see_what_the_package_gives() -> None:
    tree = ast.parse((ROOT / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    seen = {alias.asname: node.module for node in imports for alias in node.names if alias.name == alias.asname}
    given = {name: surgery._HOMES[name] for name in surgery.__all__ if not name.startswith("_")}
    assert seen == given


def _annotations(tree: ast.Module) -> list[ast.expr]:
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    arguments = [a for f in functions for a in (*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs)]
    return [found for found in (*(a.annotation for a in arguments), *(f.returns for f in functions)) if found]


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.stem)
def test_what_tests_are_annotated_with_exists(path: Path) -> None:
    module = importlib.import_module(f"tests.{path.stem}")  # mypy does not look at tests
    for annotation in _annotations(ast.parse(path.read_text())):
        eval(ast.unparse(annotation), vars(module).copy())


def test_help_imports_nothing_heavy() -> None:
    heavy = "('torch', 'numpy', 'onnx', 'onnxruntime', 'scipy', 'rich')"
    code = f"import sys, surgery.cli.group; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
