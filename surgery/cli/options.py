"""Options that several commands share, and the opening of MODEL.

File names from the command line, which are shown as they were typed: ``http://x`` does not become ``http:/x``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from surgery.errors import FileError, InputError
from surgery.system.importing import import_function
from surgery.system.units import read_bytes
from surgery.text import cut, first_line

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from surgery.kinds.inputs import Inputs
    from surgery.stages.split import Split

__all__ = [
    "FILE",
    "TypedPath",
    "as_json",
    "default_output",
    "load_function",
    "model_options",
    "open_models",
    "open_calibrated",
    "open_program",
    "open_split",
    "opening_options",
    "parse_bytes",
    "parse_shapes",
]


class TypedPath(type(Path())):  # type: ignore[misc]
    """A path whose text is what was typed; paths that are made of it have the usual text."""

    typed = ""

    def __str__(self) -> str:
        return self.typed or super().__str__()

    def beside(self, name: str) -> TypedPath:
        """Return the path of another file in the same folder, as it would be typed."""
        found: TypedPath = self.with_name(name)
        if self.typed.endswith(self.name):
            found.typed = self.typed.removesuffix(self.name) + name
        return found


class _File(click.Path):
    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> TypedPath:
        if isinstance(value, TypedPath):
            return value
        text = os.fsdecode(super().convert(value, param, ctx))
        path = TypedPath(text)
        path.typed = text
        return path


FILE = _File()


_F = TypeVar("_F", bound=Callable[..., Any])
_SEED = click.IntRange(0, 2**63 - 1)
_MOST_AXES = 64
_LONGEST = 100  # letters of an argument that are shown


def model_options(command: _F) -> _F:
    """Add the options that say how MODEL is read and what it is run on, and the memory for that."""
    return opening_options(_memory(command))


_memory = click.option(
    "--memory",
    metavar="SIZE",
    callback=lambda _context, _option, text: None if text is None else parse_bytes(text),
    help="Most memory that work on the model may need, as 12G; else nine tenths of what is free.",
)


def opening_options(command: _F) -> _F:
    """Add the options that say how MODEL is read and what it is run on."""
    for option in reversed(
        (
            click.option(
                "--input-shape",
                "input_shapes",
                multiple=True,
                metavar="[NAME:]N,N,...",
                help="Shape of an input, as 1,3,224,224 or mask:1,128; repeat it for several inputs.",
            ),
            click.option("--model", "factory", metavar="MODULE:FACTORY", help="What makes the module of a state dict."),
            click.option("--trust", is_flag=True, help="Let the file run code: pickled modules, TorchScript."),
            click.option("--seed", type=_SEED, default=0, show_default=True, help="Seed of random inputs."),
        )
    ):
        command = option(command)
    return command


def as_json(command: _F) -> _F:
    """Add --json."""
    return click.option("--json", "json_", is_flag=True, help="Print JSON instead of tables.")(command)


def parse_bytes(text: str) -> int:
    """Return a number of bytes from a text such as 12G, 500M or 1.5GB; raises InputError for any other."""
    return read_bytes(text, "--memory")


def parse_shapes(texts: tuple[str, ...]) -> list[tuple[str | None, tuple[int, ...]]]:
    """Return (name or None, shape) for each --input-shape.

    Raises:
        InputError: a text that is no shape.
    """
    return [_parse_shape(text) for text in texts]


def _parse_shape(text: str) -> tuple[str | None, tuple[int, ...]]:
    name, colon, sizes = text.rpartition(":")
    try:
        shape = tuple(int(size) for size in sizes.split(","))
    except ValueError:
        shape = ()
    if not 0 < len(shape) <= _MOST_AXES or any(not 0 < size < 2**63 for size in shape) or (colon and not name):
        allowed = f"1 to {_MOST_AXES} whole numbers above 0, as 1,3,224,224 or mask:1,128"
        raise InputError(f"--input-shape {cut(text, _LONGEST)!r}", allowed=allowed)
    return name or None, shape


def default_output(model: Path, suffix: str) -> Path:
    """Return model.<suffix> beside the model, without its own suffixes; raises FileError where it can be no file.

    The result of an .onnx file is an .onnx file, too.
    """
    if model.suffix == ".onnx" and suffix.endswith(".pt2"):
        suffix = suffix.removesuffix("pt2") + "onnx"
    if not model.name:
        raise FileError(f"{model}: is a folder", allowed="a model file")
    name = f"{model.stem}.{suffix}"
    return model.beside(name) if isinstance(model, TypedPath) else model.with_name(name)


def open_program(path: Path, **options: Any) -> tuple[Any, Inputs]:
    """Return MODEL as an exported program, or as the ONNX model that it is, and the inputs to run it on.

    The stages in a folder are joined.

    Raises:
        SurgeryError: a file that cannot be loaded, or inputs that do not fit.
    """
    model, inputs = _open(path, joined=True, **options)
    return model, _random_inputs(model, options) if inputs is None else inputs


def open_calibrated(path: Path, calibration: Path | None, **options: Any) -> tuple[Any, Inputs, Any]:
    """Return what ``open_program`` returns, and the calibration data: the file, or its samples if they had to be read.

    The inputs of an ONNX model are the first sample, if there are samples and no shape is said.

    Raises:
        SurgeryError: as ``open_program``, or data that cannot be used.
    """
    model, inputs = _open(path, joined=True, **options)
    data: Any = calibration
    if inputs is None and calibration is not None and not options["input_shapes"]:
        from surgery.data.samples import read_calibration

        data = read_calibration(calibration, model)
        inputs = next(iter(data if data.exact else data.take(slice(1))))
    return model, _random_inputs(model, options) if inputs is None else inputs, data


def open_models(paths: Sequence[Path], inputs_file: Path | None = None, **options: Any) -> tuple[list[Any], Inputs]:
    """Return models that are to run on the same inputs, and these: those in a file, or else those of the first program.

    An ONNX model has inputs of its own only if all are ONNX models.

    Raises:
        SurgeryError: as ``open_program``.
    """
    from surgery.runtime.compare import shared_inputs

    opened = [_open(path, joined=False, **options) for path in paths]
    models = [model for model, _ in opened]
    if inputs_file is not None:
        from surgery.data.samples import read_inputs

        known = next((model for model, inputs in opened if inputs is not None), models[0])
        return models, read_inputs(inputs_file, known)
    brought = next((inputs for _, inputs in opened if inputs is not None), None)
    if brought is not None or not options["input_shapes"]:
        return models, shared_inputs(models, brought, seed=options["seed"])
    return models, _random_inputs(models[0], options)


def _open(
    path: Path,
    *,
    joined: bool,
    input_shapes: tuple[str, ...],
    factory: str | None,
    trust: bool,
    memory: int | None,
    seed: int,
) -> tuple[Any, Inputs | None]:
    """Return MODEL as ``open_program`` does, and the inputs of a program; None for an ONNX model.

    Stages that are not joined run in a row.
    """
    from surgery.files.load import load
    from surgery.kinds.registry import kind_of
    from surgery.runtime.export import capture
    from surgery.stages.folder import is_folder
    from surgery.stages.split import in_a_row

    shapes = parse_shapes(input_shapes)
    if is_folder(path):
        cut, inputs = open_split(path, input_shapes=input_shapes, memory=memory, seed=seed)
        if joined:
            return cut.join(), None if cut.kind.is_onnx else inputs
        return in_a_row(cut), inputs
    samples = _random(shapes, {}, seed)[0] or None
    loaded: Any = load(path, trust=trust, model=factory, example_inputs=samples, memory=memory)
    kind = kind_of(loaded)
    if kind.is_onnx:
        return loaded, None
    program = kind.program(loaded)
    if program is not None:
        return program, _program_inputs(program, shapes, seed)
    if not shapes:
        raise InputError(f"{path} is a module, which does not know its input shapes", next_step="pass --input-shape")
    inputs = _random(shapes, {}, seed)
    return capture(loaded, inputs)[0], inputs


def open_split(folder: Path, *, input_shapes: tuple[str, ...], memory: int | None, seed: int) -> tuple[Split, Inputs]:
    """Return a folder of stages, and the inputs to run them on, which are those of the model that was split.

    Raises:
        SurgeryError: as ``open_program``.
    """
    from surgery.stages.split import load_split

    cut = load_split(folder, memory=memory)
    joined = cut.join()
    if cut.kind.is_onnx:
        return cut, _random_inputs(joined, {"input_shapes": input_shapes, "seed": seed})
    return cut, _program_inputs(joined, parse_shapes(input_shapes), seed)


def _program_inputs(program: ExportedProgram, shapes: list[tuple[str | None, tuple[int, ...]]], seed: int) -> Inputs:
    from surgery.kinds.program.kind import program_inputs

    return _fill(program, shapes, seed) if shapes else program_inputs(program, seed=seed)


def _random_inputs(model: Any, options: Mapping[str, Any]) -> Inputs:
    """Return random inputs for an ONNX model, of the shapes that are said, or else that it declares."""
    from surgery.kinds.onnx.kind import random_inputs

    said = parse_shapes(options["input_shapes"])
    return random_inputs(model, seed=options["seed"], shapes={name or at: s for at, (name, s) in enumerate(said)})


def load_function(name: str) -> Callable[[Any], float]:
    """Import ``module:function``, also from the current folder.

    Raises:
        InputError: there is none of this name.
    """
    allowed = "module:function, as metrics:accuracy for accuracy(module) in metrics.py"
    try:
        return import_function(name, what="--eval", allowed=allowed)
    except InputError:
        raise
    except (Exception, SystemExit) as error:  # importing runs the user's own code
        raise InputError(f"--eval {name!r}: {type(error).__name__}: {first_line(error)}", allowed=allowed) from error


def _fill(program: ExportedProgram, shapes: list[tuple[str | None, tuple[int, ...]]], seed: int) -> Inputs:
    """Return random inputs of the given shapes in the places and dtypes of the program's own."""
    from torch import Tensor
    from torch.utils import _pytree as pytree

    from surgery.kinds.inputs import random_tensor
    from surgery.kinds.program.kind import program_inputs
    from surgery.kinds.program.read import input_arguments

    leaves, spec = pytree.tree_flatten(program_inputs(program, seed=seed))
    names = [argument.name for argument in input_arguments(program.graph_signature)]
    wanted = {name or names[i] if i < len(names) else name: shape for i, (name, shape) in enumerate(shapes)}
    if unknown := [name for name in wanted if name not in names]:
        raise InputError(f"the program has no input {unknown[0]}", allowed=", ".join(names))
    for i, (name, leaf) in enumerate(zip(names, leaves, strict=False)):
        if name in wanted:
            if not isinstance(leaf, Tensor):
                raise InputError(f"--input-shape for {name}, which is no tensor", allowed="inputs that are tensors")
            leaves[i] = random_tensor(wanted[name], leaf.dtype, seed=seed + i, name=name)
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    return args, kwargs


def _random(shapes: list[tuple[str | None, tuple[int, ...]]], kwargs: dict[str, Any], seed: int) -> Inputs:
    import torch

    from surgery.kinds.inputs import random_tensor

    args = []
    for i, (name, shape) in enumerate(shapes):
        whole = name is not None and any(word in name for word in ("ids", "mask", "token", "position"))
        tensor = random_tensor(shape, torch.int64 if whole else torch.float32, seed=seed + i, name=name or "")
        if name is None:
            args.append(tensor)
        else:
            kwargs[name] = tensor
    return tuple(args), kwargs
