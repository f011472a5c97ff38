"""Export to ONNX: quietly, whole or not at all, and only if onnxruntime was seen to compute what PyTorch does."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

import onnx_ir as ir
import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule

from surgery.errors import CaptureError, CheckError, InputError, only_own_errors
from surgery.files.load import model_of
from surgery.files.structure import record_of
from surgery.kinds.fx.graph import read_record, write_record
from surgery.kinds.inputs import Inputs, flatten_inputs, normalise_inputs
from surgery.kinds.layers.unpacking import part_weights
from surgery.kinds.onnx.exported import mark_steps, simplify_export
from surgery.kinds.onnx.graph import RECORD
from surgery.kinds.onnx.session import TOLERANCES, feed, open_session
from surgery.kinds.registry import Model, kind_of, open_model
from surgery.runtime.compare import (
    Difference,
    compare_outputs,
    default_inputs,
    evaluating,
    flatten_outputs,
    run_model,
)
from surgery.runtime.rnn import rnn_translations
from surgery.runtime.rounding import float64_outputs, shaken_outputs
from surgery.runtime.translations import kept_translations
from surgery.sites import Entry, Record, site_name
from surgery.system.quiet import quiet
from surgery.system.scratch import scratch_folder
from surgery.system.writing import Writer, check_outputs, write_together
from surgery.text import first_line

__all__ = [
    "MAX_ROUNDING",
    "ROUNDING_SLACK",
    "ExportReport",
    "capture",
    "check_export",
    "export_onnx",
    "to_onnx",
    "write_draft",
]

# Of badly conditioned models, onnxruntime's error was 0.9 to 1.5 times PyTorch's: both round as often, in other orders.
# A sum of n random terms is off by u sqrt(n / 2) if taken one by one, u sqrt(log2 n) in a tree: 7 apart at 1000 terms.
ROUNDING_SLACK = 8.0
MAX_ROUNDING = 0.1  # relative: an export cannot be checked where float32 has no digits left
_SHAKES = 3
_SINGLE_FILE_BYTES = 2**31 - 2**24  # protobuf takes less than 2 GiB in one message; leave room for the nodes
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class ExportReport:
    """What was written and how it was checked.

    ``inputs`` has each input as ``name type shape``, with letters for dynamic sizes. The errors are the largest of any
    output, against PyTorch, on the example inputs. ``data`` is the second file, which a model of 2 GiB or more has for
    its weights.
    """

    path: Path
    size: int
    opset: int
    inputs: tuple[str, ...]
    dynamic: bool
    max_abs_error: float
    relative_error: float
    data: Path | None = None


@only_own_errors
def export_onnx(
    model: Model | str | os.PathLike[str],
    path: str | os.PathLike[str],
    example_inputs: Any = None,
    *,
    force: bool = True,
    seed: int = 0,
) -> ExportReport:
    """Write a module (in evaluation mode) or program as ONNX, after onnxruntime gave PyTorch's outputs on the inputs.

    ``model`` may be the path of its file, too.
    ``example_inputs`` are a tensor, a tuple or list, or a dict by name. A program brings its own inputs along, and its
    dynamic sizes stay dynamic. Weights of 2 GiB or more go to a second file, ``NAME.onnx.data``.

    The file has the layers of the program under their names, and the record of those that are factored. ``decompose``
    finds the same sites in it.

    Raises:
        FileError: the file cannot be written, or exists and ``force`` is False.
        InputError: inputs are missing or do not fit, or onnxruntime cannot run their types.
        CaptureError: torch cannot capture the model or write it as ONNX.
        CheckError: onnxruntime computes something else; nothing is written.
    """
    target, model = Path(path), model_of(model)
    check_outputs([target], force=force)
    if kind_of(model).is_onnx:
        raise InputError("the model is an ONNX model already", next_step="use it as it is, or surgery.save it")
    program, inputs = capture(model, example_inputs, seed=seed)
    exported = to_onnx(program)
    _keep_record(program, exported.model)
    with scratch_folder() as folder:
        draft = folder / target.name
        write_draft(exported, draft)
        session = _open_draft(draft)
        difference = check_export(program, session, inputs)
        data = _publish(draft, target, force=force)
    declared = session.get_inputs()
    return ExportReport(
        path=target,
        size=target.stat().st_size + (data.stat().st_size if data else 0),
        opset=exported.model.opset_imports[""],
        inputs=tuple(f"{d.name} {d.type[7:-1]} {'x'.join(map(str, d.shape)) or 'scalar'}" for d in declared),
        dynamic=any(isinstance(size, str) for d in declared for size in d.shape),
        max_abs_error=difference.max_abs,
        relative_error=difference.relative,
        data=data,
    )


def capture(model: Model, example_inputs: Any = None, *, seed: int = 0) -> tuple[ExportedProgram, Inputs]:
    """Return the model as a program (a module's, in evaluation mode), with its record, and inputs that it runs on.

    Raises:
        InputError: no inputs are given, and the model does not know any.
        CaptureError: torch.export cannot capture the module.
    """
    kind = kind_of(model)
    inputs = default_inputs(model, seed=seed) if example_inputs is None else normalise_inputs(example_inputs)
    if inputs is None:
        raise InputError(f"{type(model).__name__} needs example inputs", next_step="give example_inputs")
    if (program := kind.program(model)) is not None:
        return program, inputs
    args, kwargs = inputs
    run_model(model, inputs)  # inputs that do not fit are an InputError, not a failure of the capture
    module = kind.runnable(model)
    with quiet(), evaluating(module):
        program = _capturing("captured", lambda: torch.export.export(module, args, kwargs))
    own = read_record(module) if isinstance(module, GraphModule) else Record()
    write_record(program.graph_module, own or record_of(module))
    return program, inputs


def _capturing(done: str, run: Callable[[], _Result]) -> _Result:
    try:
        return run()
    except Exception as error:  # torch's exporters raise all kinds
        root: BaseException = error
        while root.__cause__ is not None:
            root = root.__cause__
        what = f"the model cannot be {done}: {first_line(root)}"
        raise CaptureError(what, next_step="see torch.export's guide") from error


def to_onnx(program: ExportedProgram) -> torch.onnx.ONNXProgram:
    """Return a program as torch writes it in ONNX; weights keep their names and their ties, chains say what they are.

    Raises:
        CaptureError: torch cannot write it.
    """
    flow = open_model(program, copies=False).flow

    def run() -> torch.onnx.ONNXProgram:
        # torch differentiates loops while it looks at them, and stumbles over dynamic sizes
        with torch.no_grad(), kept_translations():
            exported = torch.onnx.export(
                program, dynamo=True, verbose=False, optimize=False, custom_translation_table=rnn_translations()
            )
        if exported is None:
            raise InputError("torch.onnx.export returned nothing")
        simplify_export(exported.model, flow)
        mark_steps(exported.model, flow)
        return exported

    with quiet():
        return _capturing("written as ONNX", run)


def _keep_record(program: ExportedProgram, model: ir.Model) -> None:
    """Give an exported model the record of the factored sites of which it has weights.

    How a weight is stored is another thing in ONNX, and is left out.
    """
    record = read_record(program.graph_module)
    weights = [key for key in model.graph.initializers if key.endswith(".weight")]
    sites = {
        name: Entry(entry.origin, entry.weight)
        for name, entry in record.sites.items()
        if any(key.startswith(f"{name}.") for key in weights)
    }
    packed = {
        name: parts for name, parts in record.packed.items() if sites.keys() & set(map(site_name, part_weights(name)))
    }
    if sites:
        model.metadata_props[RECORD] = json.dumps(Record(sites, packed=packed).to_json())


def write_draft(exported: torch.onnx.ONNXProgram, draft: Path) -> None:
    """Write what ``to_onnx`` returned to a file; weights of 2 GiB or more go to a second one, ``draft`` with .data."""
    size = sum(value.const_value.nbytes for value in exported.model.graph.initializers.values() if value.const_value)
    with quiet():
        exported.save(draft, external_data=size > _SINGLE_FILE_BYTES)


def _open_draft(draft: Path) -> Any:
    try:
        return open_session(draft)
    except InputError as error:
        reason = error.what.partition(": ")[2]
        what = f"onnxruntime's CPU kernels do not take the exported model, so that it cannot be checked: {reason}"
        raise InputError(what, next_step="convert it with model.float()") from error


def check_export(program: ExportedProgram, session: Any, inputs: Inputs) -> Difference:
    """Return the differences of an onnxruntime session from the program that was exported to it, on inputs.

    An output within ``TOLERANCES`` is right. Any other is judged by what rounding does to this program. Its error
    against a run of the program in float64 may be ``ROUNDING_SLACK`` times the larger of two numbers: the error of the
    program itself, and the change of its outputs when its weights and inputs move by their last place. It may never be
    above ``MAX_ROUNDING``, where a wrong export could not be told from rounding. Outputs are judged one by one.

    Raises:
        InputError: the inputs do not fit the session.
        CheckError: the session fails, or computes something else.
    """
    feeds = feed(session, inputs, program)
    try:
        found = tuple(torch.from_numpy(array) for array in session.run(None, feeds))
    except Exception as error:  # onnxruntime's exceptions share no other base
        raise CheckError(f"onnxruntime cannot run the exported model: {first_line(error)}") from error
    expected = run_model(program, inputs)
    try:
        difference = compare_outputs(expected, found)
    except InputError as error:
        raise CheckError(f"the exported model has other outputs: {error.what}") from error
    floats = [*flatten_inputs(inputs, program), *found, *program.state_dict.values()]
    tolerance = max((TOLERANCES[t.dtype] for t in floats if t.dtype in TOLERANCES), default=0.0)
    if difference.relative <= tolerance:
        return difference
    wrong = f"onnxruntime's outputs differ from PyTorch's by a relative error of {difference.relative:.2g}"
    if not math.isfinite(difference.relative):  # infinities or NaN in other places
        raise CheckError(wrong, allowed=f"at most {tolerance:g}", next_step="nothing was written")
    plain = [tensor for _, tensor in flatten_outputs(expected)]
    if not compare_outputs(expected, run_model(program, inputs)).relative <= tolerance:
        raise CheckError(f"{wrong}, whose own differ from run to run", next_step="nothing was written")
    errors, allowed = _against_rounding(program, inputs, plain, found, tolerance)
    # The output furthest above its own limit; an output of whole numbers may have the limit 0.
    worst = max(range(len(errors)), key=lambda output: errors[output] / max(allowed[output], 1e-300))
    if not errors[worst] <= allowed[worst]:
        most = f"at most {allowed[worst]:.2g}, with regard to rounding, and it is {errors[worst]:.2g}"
        raise CheckError(wrong, allowed=most, next_step="nothing was written")
    return difference


def _against_rounding(
    program: ExportedProgram, inputs: Inputs, expected: Sequence[Tensor], found: Sequence[Tensor], tolerance: float
) -> tuple[list[float], list[float]]:
    """Return the error of each output that was found, and the largest that rounding can explain."""
    exact = float64_outputs(program, inputs)
    if exact is not None:
        exact = [_where_finite(value, wanted) for value, wanted in zip(exact, expected, strict=True)]
        rounding = _relative(exact, expected)
    # Without numbers in float64 the program's own are taken for exact, and its rounding is what shaking shows.
    if exact is None or not all(map(math.isfinite, rounding)):
        exact, rounding = list(expected), [0.0] * len(expected)
    for seed in range(_SHAKES):
        shaken = shaken_outputs(program, inputs, seed=seed)
        if shaken is not None:
            rounding = [max(pair) for pair in zip(rounding, _relative(expected, shaken), strict=True)]
    # Example of a tolerance of 1e-4: a rounding of 1e-3 allows 8e-3, one of 0.05 allows 0.1, one of 1e-9 the tolerance.
    allowed = [max(tolerance, min(ROUNDING_SLACK * value, MAX_ROUNDING)) for value in rounding]
    return _relative(exact, found), allowed


def _where_finite(exact: Tensor, expected: Tensor) -> Tensor:
    """Return the exact numbers; where a narrow type overflowed to infinity or NaN, return what the program gave."""
    return exact if not expected.is_floating_point() else torch.where(torch.isfinite(expected), exact, expected)


def _relative(first: Sequence[Tensor], second: Sequence[Tensor]) -> list[float]:
    """Return the relative error of each output; infinite where shapes differ."""
    if [a.shape for a in first] != [b.shape for b in second]:
        return [math.inf] * len(first)
    return [output.relative for output in compare_outputs(list(first), list(second)).outputs]


def _publish(draft: Path, target: Path, *, force: bool) -> Path | None:
    """Copy the checked draft to its place, the weights first, so that a model is never without its weights."""
    source, data = draft.with_name(draft.name + ".data"), target.with_name(target.name + ".data")
    files = [(data, _copier(source))] if source.exists() else []
    write_together([*files, (target, _copier(draft))], force=force)
    return data if files else None


def _copier(source: Path) -> Writer:
    def copy(file: IO[bytes]) -> None:
        with source.open("rb") as opened:
            shutil.copyfileobj(opened, file)

    return copy
