"""The structure of a checkout, measured from its source: the imports, and the lengths of files and functions.

``Source(tree)`` reads ``tree/surgery`` and imports nothing of it. Only import statements count: an import by a string
through ``importlib`` is not seen.
"""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

__all__ = ["Function", "Module", "Source", "functions"]

Definition = ast.FunctionDef | ast.AsyncFunctionDef
_WITHOUT_ROOM = ("__init__", "__main__")  # the package's entry points; they do not count as files at the root


@dataclass(frozen=True)
class Function:
    """One function of a module: its qualified name, its lines from ``def`` to the end, its parameters without self."""

    name: str
    lines: int
    parameters: int


@dataclass(frozen=True)
class Module:
    """One file: its dotted name, its path, its text."""

    name: str
    path: Path
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        """The syntax tree."""
        return ast.parse(self.text, str(self.path))

    @property
    def lines(self) -> int:
        """How many lines the file has."""
        return len(self.text.splitlines())

    @property
    def is_package(self) -> bool:
        """Whether the file is the ``__init__`` of a folder."""
        return self.path.name == "__init__.py"

    @cached_property
    def comment_lines(self) -> int:
        """How many lines have a comment, alone or after code."""
        tokens = tokenize.generate_tokens(io.StringIO(self.text).readline)
        return len({token.start[0] for token in tokens if token.type == tokenize.COMMENT})


def functions(node: ast.AST, prefix: str = "", *, method: bool = False) -> Iterator[Function]:
    """All functions below a node, nested ones and methods too."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Definition):
            name = f"{prefix}{child.name}"
            bound = method and not any(_called(d) == "staticmethod" for d in child.decorator_list)
            yield Function(name, (child.end_lineno or child.lineno) - child.lineno + 1, _parameters(child.args, bound))
            yield from functions(child, f"{name}.")
        elif isinstance(child, ast.ClassDef):
            yield from functions(child, f"{prefix}{child.name}.", method=True)
        else:
            yield from functions(child, prefix, method=method)


def _called(decorator: ast.expr) -> str:
    return decorator.id if isinstance(decorator, ast.Name) else ""


def _parameters(arguments: ast.arguments, bound: bool) -> int:
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return len(named) - bound + (arguments.vararg is not None) + (arguments.kwarg is not None)


class Source:
    """The package ``surgery`` of a tree, as text."""

    def __init__(self, tree: Path, package: str = "surgery") -> None:
        self.package = package
        root = tree / package
        self.modules = {m.name: m for m in sorted(_read(root, package), key=lambda module: module.name)}

    @cached_property
    def functions(self) -> dict[str, Function]:
        """All functions, by the module and the qualified name."""
        return {f"{m.name}:{f.name}": f for m in self.modules.values() for f in functions(m.tree)}

    @property
    def at_the_root(self) -> list[str]:
        """The files at the root of the package, without ``__init__`` and ``__main__``."""
        alone = [m for m in self.modules.values() if m.name.count(".") == 1 and not m.is_package]
        return [m.path.stem for m in alone if m.path.stem not in _WITHOUT_ROOM]

    def imports(self, name: str, *, lazy: bool = True) -> set[str]:
        """The modules of the package that a module imports; without ``lazy`` only those that are loaded with it.

        Imports inside functions, and those only for type checkers, are lazy.
        """
        module = self.modules[name]
        nodes = ast.walk(module.tree) if lazy else _run_on_import(module.tree)
        found = {target for node in nodes for target in self._targets(node)}
        return found - {name}

    def _targets(self, node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in self.modules)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                target = inner if inner in self.modules else node.module
                if target in self.modules:
                    yield target

    def closure(self, name: str) -> set[str]:
        """The modules that are loaded when one is imported: itself, all that it needs, and their packages."""
        found: set[str] = set()
        waiting = [name]
        while waiting:
            module = waiting.pop()
            if module in found:
                continue
            found.add(module)
            parent = module.rpartition(".")[0]
            waiting += [parent] * bool(parent) + sorted(self.imports(module, lazy=False))
        return found

    def public_functions(self) -> dict[str, Function]:
        """The functions in the package's table of public names, and the public methods of the classes in it."""
        found: dict[str, Function] = {}
        init = self.modules[self.package]
        for node in _froms(init.tree):
            for alias in node.names:
                if alias.asname == alias.name and node.module:  # as the type-checking block writes them
                    found |= self._public(node.module, alias.name)
        return found

    def _public(self, module: str, name: str) -> dict[str, Function]:
        module = self._home(module, name)
        own = {key.partition(":")[2]: f for key, f in self.functions.items() if key.startswith(f"{module}:")}
        methods = {key: f for key, f in own.items() if key.startswith(f"{name}.") and key.count(".") == 1}
        shown = {key: f for key, f in methods.items() if key.endswith(".__init__") or not _private(key)}
        return shown | {key: f for key, f in own.items() if key == name}

    def _home(self, module: str, name: str) -> str:
        """Return the module that defines a name, following packages that pass it on."""
        for node in _froms(self.modules[module].tree):
            passed = name in [alias.asname or alias.name for alias in node.names]
            if passed and node.module in self.modules:
                return self._home(node.module, name)
        return module


def _froms(tree: ast.Module) -> list[ast.ImportFrom]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]


def _private(name: str) -> bool:
    return name.rpartition(".")[2].startswith("_")


def _read(root: Path, package: str) -> Iterator[Module]:
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        yield Module(".".join([package, *parts]), path, path.read_text(encoding="utf-8"))


def _run_on_import(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes that run when a module is imported: no bodies of functions, no blocks for type checkers."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Definition | ast.Lambda):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for other in child.orelse:
                yield other
                yield from _run_on_import(other)
            continue
        yield child
        yield from _run_on_import(child)
