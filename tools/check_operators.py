"""Check the list of operators that a file may call: whether real models need others, and whether a call crashes.

    .venv/bin/python tools/check_operators.py                    # exports some hundred architectures, one line for each
    .venv/bin/python tools/check_operators.py --fuzz             # calls each operator with random arguments

Each architecture is exported in its own process, within a minute of processor time. It passes if all operators of its
program are on the list. An architecture that torch.export cannot write is named and not counted. The last lines list
the operators that are used, those of them that are not in Core ATen, and why these are on the list. --fuzz ends with
status 1 if a call ended its process.
"""

from __future__ import annotations

import argparse
import collections
import json
import logging
import os
import resource
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script finds modules in tools/ only

from surgery.errors import SurgeryError
from surgery.files.guard.operators import GROUPS, check_operator, group_of
from surgery.text import first_line, wrap
from tools.architectures import TORCHVISION, TRANSFORMERS, transformer

SECONDS = 60
WIDTH = 110


def architectures() -> Iterator[tuple[str, Callable[[], tuple[nn.Module, Any]]]]:
    """Yield the name of each architecture and a function that makes it with its inputs."""
    from tests.zoo import ZOO

    for name, build in ZOO.items():
        yield f"zoo: {name}", build
    for name, build in TORCHVISION.items():
        yield f"torchvision: {name}", build
    for name in TRANSFORMERS:
        yield f"transformers: {name}", partial(transformer, name)


def operators(program: ExportedProgram) -> set[str]:
    """Return the operators of a program, as a file names them."""
    found = set()
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            target: Any = node.target
            if node.op != "call_function":
                continue
            if isinstance(target, torch._ops.OpOverload):
                found.add(f"torch.ops.{target.namespace}.{target._opname}.{target._overloadname}")
            elif isinstance(target, torch._ops.HigherOrderOperator):
                found.add(f"torch.ops.higher_order.{target.name()}")
            else:
                home = "torch" if target.__module__.startswith("torch") else target.__module__
                found.add(f"{home}.{target.__name__}")
    return found


def _export(build: Callable[[], tuple[nn.Module, Any]]) -> list[str]:
    torch.manual_seed(0)
    model, inputs = build()
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
    return sorted(operators(torch.export.export(model, args, kwargs)))


def _apart(work: Callable[[], list[str]]) -> list[str] | str:
    """Call a function in a child, within a minute of processor time; return its result, or why there is none."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
        signal.alarm(10 * SECONDS)
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, 1), os.dup2(nothing, 2)
        try:
            found: Any = work()
        except BaseException as error:
            found = f"{type(error).__name__}: {first_line(error)}"[:100]
        with os.fdopen(writer, "w") as stream:
            json.dump(found, stream)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as stream:
        data = stream.read()
    os.waitpid(child, 0)
    return json.loads(data) if data else f"more than {SECONDS} s"


def refused(names: Iterable[str]) -> list[str]:
    """Return the operators that a file must not call."""
    found = []
    for name in names:
        try:
            check_operator(name)
        except SurgeryError:
            found.append(name)
    return found


def _is_core(target: str) -> bool:
    if not target.startswith("torch.ops.aten."):
        return False
    _, _, _, name, overload = target.split(".")
    return torch.Tag.core in getattr(getattr(torch.ops.aten, name), overload).tags


def _say(label: str, names: list[str], users: collections.Counter[str]) -> None:
    short = [f"{name.removeprefix('torch.ops.')} ({users[name]})" for name in names]
    print(f"\n{label}: {len(names)}")
    print("\n".join(f"    {line}" for line in wrap(", ".join(short), WIDTH)))


def table(only: list[str]) -> int:
    """Print the table; return 1 if an operator of an architecture is not on the list."""
    import transformers

    transformers.logging.set_verbosity_error()
    users: collections.Counter[str] = collections.Counter()
    exported = bad = 0
    print(f"torch {torch.__version__}, transformers {transformers.__version__}")
    for name, build in architectures():
        if only and not any(word in name for word in only):
            continue
        found = _apart(partial(_export, build))
        if isinstance(found, str):
            print(f"{name}: not exported: {found}", flush=True)
            continue
        exported, missing = exported + 1, refused(found)
        bad += bool(missing)
        users.update(found)
        print(f"{name}: {len(found)} operators, {', '.join(missing) or 'all on the list'}", flush=True)
    print(f"\noperators of {exported} architectures: {len(users)} are used, {exported - bad} architectures pass")
    by_group: dict[str, list[str]] = collections.defaultdict(list)
    for name, _ in users.most_common():
        by_group["Core ATen" if _is_core(name) else group_of(name) or name.rpartition(".")[0]].append(name)
    for label, names in by_group.items():
        reason = f"{label}: {GROUPS[label].reason}" if label in GROUPS else label
        _say(reason, names, users)
    return int(bad > 0)


def main() -> int:
    """Run the requested check; return 1 if it finds anything wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="only architectures or operators whose names hold one of these")
    parser.add_argument("--fuzz", action="store_true", help="call each operator with random arguments")
    parser.add_argument("--rounds", type=int, default=24, help="calls of each operator (default 24)")
    parser.add_argument("--seed", type=int, default=0, help="of the arguments (default 0)")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable()
    torch.set_num_threads(1)
    from tools.operator_calls import fuzz

    return fuzz(options.words, options.rounds, options.seed) if options.fuzz else table(options.words)


if __name__ == "__main__":
    sys.exit(main())
