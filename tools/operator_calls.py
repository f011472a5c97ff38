"""Call the operators that a file may name at random, each operator in its own process, which no call may end.

A call is a real one (``tools/honest_calls.py``) with a few changed arguments, if there is one. Otherwise its arguments
only fit the schema: small tensors of several kinds, some with unusual strides, a few long ones, whole numbers from -3
to 5 and huge ones. Calls that ``check_call`` refuses are left out. Memory is limited, so that a call that asks for too
much fails at once.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from surgery.errors import SurgeryError
from surgery.files.guard.operators import overloads
from surgery.files.guard.rules import check_values
from tools.honest_calls import Call, honest_calls

__all__ = ["call_randomly", "fuzz", "outcome"]

MEBIBYTES, SECONDS = 600, 20

_SHAPES: list[tuple[int, ...]] = [
    (), (0,), (1,), (3,), (2, 3), (3, 3), (3, 0), (2, 3, 4), (1, 4, 4), (1, 2, 4, 4), (2, 3, 4, 4), (1, 2, 3, 4, 4),
]  # fmt: skip
# a few long ones: an operator that reads as far in a short one leaves the memory of the process
_LONG: list[tuple[int, ...]] = [(1 << 20,), (2, 1 << 18), (1, 1 << 18, 2, 1)]
_DTYPES = [torch.float32] * 4 + [
    torch.float64, torch.int64, torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64, torch.float16,
    torch.bfloat16,
]  # fmt: skip
_HUGE = [2**31 - 1, 2**31, 2**34, 2**62, 2**63 - 1, -(2**63), -(2**31), 10**6]
_FLOATS = [0.0, 1.0, 0.5, -1.5, float("nan"), float("inf"), 1e30, -1e300, 1e-9]
_SAID = "mean sum none floor trunc ij xy constant reflect replicate circular same valid amax prod linear fro L"
_WORDS = _SAID.split()
_FORMATS = [torch.contiguous_format, torch.preserve_format, torch.channels_last]


def _integer(dice: random.Random) -> int:
    return dice.choice(_HUGE) if dice.random() < 0.12 else dice.randint(-3, 5)


def _tensor(dice: random.Random, shape: tuple[int, ...]) -> Tensor:
    if dice.random() < 0.3:
        shape = dice.choice(_LONG) if dice.random() < 0.1 else dice.choice(_SHAPES)
    dtype = dice.choice(_DTYPES)
    if dtype.is_floating_point or dtype.is_complex:
        made = torch.randn(shape).to(dtype)
    elif dice.random() < 0.25 and dtype is not torch.bool:
        made = torch.full(shape, dice.choice(_HUGE)).to(dtype)
    else:
        made = torch.randint(0 if dtype is torch.uint8 else -3, 6, shape).to(dtype)
    form = dice.random()
    if not made.dim() or not made.numel():
        return made
    if form < 0.12:
        return made.transpose(0, -1)
    if form < 0.2:
        return made[:1].expand(shape)
    return made.flip(0)[..., ::2] if form < 0.25 else made


_MAKERS: dict[str, Callable[[random.Random], Any]] = {
    "IntType": _integer,
    "SymIntType": _integer,
    "FloatType": lambda dice: dice.choice(_FLOATS),
    "BoolType": lambda dice: dice.random() < 0.5,
    "NumberType": lambda dice: dice.choice([_integer(dice), _integer(dice), dice.choice(_FLOATS), True]),
    "ComplexType": lambda dice: complex(1, 2),
    "StringType": lambda dice: dice.choice(_WORDS),
    "ScalarTypeType": lambda dice: dice.choice(_DTYPES),
    "LayoutType": lambda dice: torch.strided,
    "MemoryFormatType": lambda dice: dice.choice(_FORMATS),
    "DeviceObjType": lambda dice: torch.device("cpu"),
    "GeneratorType": lambda dice: None,
}


def _value(dice: random.Random, kind: Any, shape: tuple[int, ...]) -> Any:
    name = kind.kind()
    if name == "OptionalType":
        return None if dice.random() < 0.4 else _value(dice, kind.getElementType(), shape)
    if name == "ListType":
        count = dice.choice([0, 1, 1, 2, 2, 3, 4])
        return [_value(dice, kind.getElementType(), shape) for _ in range(count)]
    return _tensor(dice, shape) if name == "TensorType" else _MAKERS[name](dice)


def _arguments(dice: random.Random, operator: Any) -> dict[str, Any]:
    shape = dice.choice(_LONG) if dice.random() < 0.05 else dice.choice(_SHAPES)
    return {
        each.name: _value(dice, each.real_type, shape)
        for each in operator._schema.arguments
        if not each.has_default_value() or dice.random() < 0.6
    }


def _changed_tensor(dice: random.Random, value: Tensor) -> Tensor:
    form = dice.random()
    if form < 0.2 and value.dim():
        return value.narrow(dice.randrange(value.dim()), 0, 0)
    if form < 0.4 and not (value.is_floating_point() or value.is_complex() or value.dtype is torch.bool):
        return torch.full_like(value, dice.choice([-1, -3, 5, 1000, 2**31 - 1, -(2**31), 2**20]))
    if form < 0.5:
        return value.unsqueeze(0)
    return _tensor(dice, tuple(value.shape))


def _changed(dice: random.Random, value: Any) -> Any:
    """Return another value of the same kind."""
    if isinstance(value, Tensor):
        return _changed_tensor(dice, value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return _integer(dice)
    if isinstance(value, float | str):
        return dice.choice(_FLOATS if isinstance(value, float) else _WORDS)
    if not isinstance(value, list | tuple) or not value:
        return value
    parts, place = list(value), dice.randrange(len(value))
    form = dice.random()
    if form < 0.7:
        parts[place] = _changed(dice, parts[place])
    elif form < 0.85:
        parts.pop(place)
    else:
        parts.append(parts[place])
    return parts


def _mutated(dice: random.Random, honest: Call) -> Call:
    made = dict(honest)
    for _ in range(dice.choice([1, 1, 2, 3])):
        name = dice.choice(list(made))
        made[name] = _changed(dice, made[name])
    return made


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype)[6:]}{tuple(value.shape)} by {value.stride()}"
    return f"[{', '.join(map(_shown, value))}]" if isinstance(value, list | tuple) else repr(value)


def _read(value: Any) -> None:
    """Read every number in a result, so that memory errors show."""
    for each in value if isinstance(value, tuple | list) else [value]:
        if isinstance(each, Tensor) and each.numel() < 1 << 24:
            each.clone()


def _copied(value: Any) -> Any:
    """Return the arguments with copied tensors, since an operator may write to them."""
    return tree_map(lambda each: each.clone() if isinstance(each, Tensor) else each, value)


def call_randomly(target: str, rounds: int, seed: int, honest: list[Call], tell: Callable[[str], None]) -> int:
    """Call an operator with random arguments; return how many calls came back. Each call is passed to ``tell`` first.

    If real calls are given, three in four calls are changed copies of them.
    """
    *_, namespace, name, overload = target.split(".")
    operator = getattr(getattr(getattr(torch.ops, namespace), name), overload)
    done = 0
    for number in range(rounds):
        dice = random.Random(f"{target} {seed} {number}")
        torch.manual_seed(number)
        arguments = _mutated(dice, dice.choice(honest)) if honest and number % 4 else _arguments(dice, operator)
        try:
            check_values(target, (), arguments)
        except SurgeryError:
            continue
        tell(", ".join(f"{key}={_shown(value)}" for key, value in arguments.items()))
        try:
            _read(operator(**_copied(arguments)))
            done += 1
        except Exception:  # an operator may refuse: most of these calls are nonsense
            continue
    return done


def _limit() -> None:
    with open("/proc/self/statm") as file:
        taken = int(file.read().split()[0]) * resource.getpagesize()
    most = taken + (MEBIBYTES << 20)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))


def outcome(target: str, rounds: int, seed: int, honest: list[Call]) -> tuple[int, str]:
    """Call an operator in a child; return its signal or 0, and its last arguments or how many calls came back."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        _limit()
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, 1), os.dup2(nothing, 2)
        done = call_randomly(target, rounds, seed, honest, lambda text: _write(writer, text[:2000]))
        _write(writer, str(done))
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, errors="replace") as stream:
        last = stream.read().rpartition("\n")[0].rpartition("\n")[2]
    _, status = os.waitpid(child, 0)
    return (os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0), last


def _write(stream: int, text: str) -> None:
    os.write(stream, (text + "\n").encode())


def fuzz(words: list[str], rounds: int, seed: int) -> int:
    """Call each operator that a file may name; print those that end a process, and return 1 if there are any."""
    warnings.simplefilter("ignore")
    import torch.ao.quantization.fx._decomposed  # registers quantized_decomposed

    torch.ops.prims.abs.default(torch.ones(2))  # imports once, before the forks
    targets = [target for target in overloads() if not words or any(word in target for word in words)]
    honest, ended, never = honest_calls(), 0, []
    for target in targets:
        number, last = outcome(target, rounds, seed, honest.get(target, []))
        if number:
            ended += 1
            print(f"{target}: {signal.Signals(number).name} by {last[:600]}", flush=True)
        elif last == "0":
            never.append(target.removeprefix("torch.ops."))
    print(f"{len(targets)} operators, {rounds} calls of each, seed {seed}: {ended} ended their process")
    print(f"{len(honest)} were called as in real programs; no call of these {len(never)} returned:")
    print(" ".join(never))
    sys.stdout.flush()
    return int(ended > 0)
