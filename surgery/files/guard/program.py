"""Check the program inside a .pt2 archive: what ``models/model.json`` may say. Runs nothing.

torch builds the program from strings of this file. Several of these strings reach ``exec``, ``eval``, ``getattr`` or
``import``. Each path below was found by reading torch 2.13, and each is closed here by an allowlist:

=====================================  ==============================================================================
a string of the file                   what torch does with it, and what is allowed instead
=====================================  ==============================================================================
names of values, nodes, graphs,        pasted into Python source that fx ``exec``s *while loading*
arguments, ``forward_arg_names``       (``def forward(self, NAME)``): ASCII identifiers only
keyword names in ``in_spec``           pasted likewise by ``ep.module()``: ASCII identifiers only
parameter, buffer, module names        pasted into ``getattr(x, "NAME")`` source: dotted words without quotes or dunders
constant string inputs; keys of dict   pasted between quotes into the guards function that ``ep.module()`` ``exec``s:
inputs                                 printable text without quotes, backslashes, braces
``guards_code``                        ``exec``ed by ``ep.module()``: comparisons of input sizes, by ``ast`` and bounded
                                       (``guards.py``)
``expr_str``, range constraint keys    ``sympy.sympify``, which is ``eval``: symbols, arithmetic and named functions of
                                       integers, by ``ast`` and bounded (``expressions.py``)
node targets, ``as_operator``          ``getattr`` chains from ``torch``, ``operator``, ``math``, later called
                                       (``torch.load``, ``torch.hub.load``, ``_operator.methodcaller``), or crash on
                                       their arguments: a list (``operators.py``) and checks of arguments
                                       (``arguments.py``)
``source_fn_stack`` in metadata        ``getattr`` chain, not called: dotted words without dunders
treespecs                              ``__enum__`` contexts and ``defaultdict`` factories import any module and call
                                       any function: no enums, factories from a short list, registered types only
custom objects                         ``torch._C._pickle_load_obj`` or ``pickle.loads``: none
a wrong JSON type                      would slip a string past the checks above (``{"as_int": "code"}``): every
                                       field must have the type in torch's own schema
=====================================  ==============================================================================

One thing stays open by design: running the loaded program computes any tensor arithmetic that it holds, however long.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import json
import re
import typing
from collections.abc import Callable, Iterator
from enum import IntEnum
from typing import Any

from torch._export.serde import schema
from torch._export.serde.union import _Union
from torch.utils import _pytree

from surgery.errors import FileError, UnsafeFileError
from surgery.files.guard.arguments import check_module, check_region
from surgery.files.guard.expressions import (
    NUMBER,
    TRUTH,
    check_expression,
    check_expressions_in_all,
    check_sizes,
    check_symbols,
)
from surgery.files.guard.guards import check_guards
from surgery.files.guard.operators import check_operator

__all__ = ["check_key", "check_program", "check_schema", "check_treespec"]


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_LONGEST = 1000  # characters of a name or key
_MOST_AXES = 64  # of a tensor
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
# Words of a dotted path: none of these characters can end the quoted text that torch makes of it.
_WORD = re.compile(r"[A-Za-z0-9_\-:/+@ ]+", re.ASCII)
_DUNDER = re.compile(r"__.*__")

_DEFAULT_FACTORIES = frozenset(["list", "dict", "int", "float", "tuple", "set", "str", "bool"])
# The output classes of transformers register themselves with pytree when their module is imported.
_OUTPUT_MODULES = re.compile(r"(transformers\.(?:modeling_outputs|models\.\w+\.modeling_\w+))\.\w+", re.ASCII)


def _check_name(name: str) -> None:
    if len(name) > _LONGEST or not _IDENTIFIER.fullmatch(name):
        raise UnsafeFileError(f"it names a value {name[:60]!r}", allowed="plain identifiers")


def _check_path(path: str) -> None:
    if not path:
        return
    if len(path) > _LONGEST or not all(_WORD.fullmatch(word) and not _DUNDER.match(word) for word in path.split(".")):
        raise UnsafeFileError(f"it names a parameter or module {path[:60]!r}", allowed="dotted words")


def check_key(text: str) -> None:
    """Raise UnsafeFileError for text that could end the quoted string into which torch pastes it."""
    if len(text) > _LONGEST or not text.isprintable() or set(text) & set("'\"\\`{}"):
        raise UnsafeFileError(f"it uses {text[:60]!r} as a key or constant", allowed="text without quotes or braces")


def _parse(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FileError(f"{what} is not JSON ({type(error).__name__})") from None


def _check_metadata(metadata: dict[str, str]) -> None:
    if any("\r" in value for value in metadata.values()):
        raise UnsafeFileError("its metadata holds a carriage return, which ends a comment in printed code")
    # "name,target;name,target": torch follows each target by getattr.
    for entry in metadata.get("source_fn_stack", "").split(";"):
        target = entry.rpartition(",")[2]
        if any(_DUNDER.match(word) for word in target.split(".")):
            raise UnsafeFileError(f"its metadata names {target[:60]!r}", allowed="names without dunders")
    for key in ("custom", "from_node"):
        if text := metadata.get(key):
            _parse(text, f"the metadata {key!r} of a node")


def _check_context(context: Any) -> None:
    if isinstance(context, str):
        check_key(context)
    elif isinstance(context, list):
        for each in context:
            _check_context(each)
    elif isinstance(context, dict):
        if "__enum__" in context:
            raise UnsafeFileError("its input structure names an enum, which torch would import")
        for key, value in context.items():
            check_key(key)
            _check_context(value)


def _check_factory(context: Any) -> None:
    module, name = context.get("default_factory_module"), context.get("default_factory_name")
    if module != "builtins" or name not in _DEFAULT_FACTORIES:
        raise UnsafeFileError(f"its input structure would call {module}.{name}", allowed="builtin containers")


def _register(kind: str) -> None:
    """Import the library module that registers this output class, if the class is known and the library installed."""
    match = _OUTPUT_MODULES.fullmatch(kind)
    if match and kind not in _pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE and importlib.util.find_spec("transformers"):
        importlib.import_module(match[1])


def _check_tree(node: Any) -> None:
    if not isinstance(node, dict) or not isinstance(node.get("children_spec"), list):
        raise FileError("its input structure is malformed")
    kind, context = node.get("type"), node.get("context")
    if kind is not None:
        _register(str(kind))
        if kind not in _pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE or kind == "NO_SERIALIZED_TYPE_NAME_FOUND":
            next_step = "import the module that registers it with torch.utils._pytree first"
            raise FileError(f"its inputs or outputs hold a {str(kind)[:80]!r}, unknown here", next_step=next_step)
    # torch parses the context of most types as JSON, with a hook for enums: check what the hook will see
    parsed = _parse(context, "a pytree context") if isinstance(context, str) and context[:1] in '[{"' else context
    _check_context(parsed)
    if kind == "collections.defaultdict":
        _check_factory(parsed if isinstance(parsed, dict) else {})
    for child in node["children_spec"]:
        _check_tree(child)


def check_treespec(text: str) -> None:
    """Check a serialised pytree structure; raises UnsafeFileError if it would import or call anything."""
    parsed = _parse(text, "a pytree structure")
    if not isinstance(parsed, list) or len(parsed) != 2:
        raise FileError("its input structure is malformed")
    _check_tree(parsed[1])


def _check_keywords(text: str) -> None:
    """Check keyword names: they become parameters of ``def forward`` if ``forward_arg_names`` is empty."""
    children = _parse(text, "a pytree structure")[1]["children_spec"]
    for child in children:
        if child.get("type") == "builtins.dict":
            keywords = _parse(child["context"], "a pytree context")
            if not isinstance(keywords, list):
                raise FileError("its input structure is malformed")
            for keyword in keywords:
                _check_name(str(keyword))


def _refuse_object(_: dict[str, Any]) -> None:
    raise UnsafeFileError("it holds a custom object, which is stored as a pickle")


def _check_graph(graph: dict[str, Any]) -> None:
    for name in ("tensor_values", "sym_int_values", "sym_bool_values", "sym_float_values"):
        for key in graph.get(name, {}):
            _check_name(key)
    for each in graph["inputs"]:
        if "as_string" in each:
            check_key(each["as_string"])


def _check_argument(argument: dict[str, Any]) -> None:
    if "as_operator" in argument:
        check_operator(argument["as_operator"])
    for key in argument.get("as_string_to_argument", {}):
        check_key(key)


def _check_node(node: dict[str, Any]) -> None:
    check_operator(node["target"])
    _check_metadata(node["metadata"])
    if node.get("name"):
        _check_name(node["name"])


def _check_signature(signature: dict[str, Any]) -> None:
    check_treespec(signature["in_spec"])
    check_treespec(signature["out_spec"])
    _check_keywords(signature["in_spec"])
    for name in signature.get("forward_arg_names") or []:
        _check_name(name)


def _check_region(argument: dict[str, Any]) -> None:
    _check_name(argument["name"])
    check_region(argument["graph"])


def _check_module(module: dict[str, Any]) -> None:
    for key, value in module.get("metadata", {}).items():
        _parse(value, f"the metadata {key[:60]!r}")
    check_module(module)


def _check_symbol(value: dict[str, Any], kind: str) -> None:
    if expression := value.get("as_expr"):
        check_expression(expression["expr_str"], kind)


def _check_tensor(meta: dict[str, Any]) -> None:
    sizes = meta["sizes"]
    if len(sizes) > _MOST_AXES or len(sizes) != len(meta["strides"]):
        what = f"it describes a tensor with {len(sizes)} sizes and {len(meta['strides'])} strides"
        raise FileError(what, allowed=f"equal numbers of both, at most {_MOST_AXES}")
    check_sizes(size["as_expr"]["expr_str"] for size in sizes if "as_expr" in size)


def _check_program(program: dict[str, Any]) -> None:
    check_symbols(program["range_constraints"])
    check_guards(program)
    if set(program.get("verifiers", [])) - {"", "ATEN", "TRAINING"}:
        raise FileError(f"it asks for the verifiers {str(program['verifiers'])[:60]}", allowed="ATEN, TRAINING")


def _check_payload(payload: dict[str, Any]) -> None:
    for name in payload["config"]:
        _check_path(name)


def _check_fields(definition: dict[str, Any]) -> None:
    for name in definition["field_names"]:
        _check_name(name)


def _names(*fields: str) -> Callable[[dict[str, Any]], None]:
    def check(value: dict[str, Any]) -> None:
        for field in fields:
            if value.get(field):
                (_check_path if field.endswith("_name") and field != "as_name" else _check_name)(value[field])

    return check


# schema class -> the check of its strings, made after the check of its types
_CHECKS: dict[str, Callable[[dict[str, Any]], None]] = {
    "Argument": _check_argument,
    "BufferMutationSpec": _names("buffer_name"),
    "ConstantValue": lambda value: check_key(value.get("as_string", "")),
    "CustomObjArgument": _refuse_object,
    "ExportedProgram": _check_program,
    "GradientToParameterSpec": _names("parameter_name"),
    "GradientToUserInputSpec": _names("user_input_name"),
    "Graph": _check_graph,
    "GraphArgument": _check_region,
    "GraphModule": _check_module,
    "InputToBufferSpec": _names("buffer_name"),
    "InputToConstantInputSpec": _names("name"),
    "InputToParameterSpec": _names("parameter_name"),
    "InputToTensorConstantSpec": _names("tensor_constant_name"),
    "ModuleCallEntry": lambda value: _check_path(value["fqn"]),
    "ModuleCallSignature": _check_signature,
    "NamedArgument": _names("name"),
    "Node": _check_node,
    "ParameterMutationSpec": _names("parameter_name"),
    "NamedTupleDef": _check_fields,
    "PayloadConfig": _check_payload,
    "SymBool": lambda value: _check_symbol(value, TRUTH),
    "SymBoolArgument": _names("as_name"),
    "SymFloat": lambda value: _check_symbol(value, NUMBER),
    "SymFloatArgument": _names("as_name"),
    "SymInt": lambda value: _check_symbol(value, NUMBER),
    "SymIntArgument": _names("as_name"),
    "TensorArgument": _names("name"),
    "TensorMeta": _check_tensor,
    "TokenArgument": _names("name"),
    "UserInputMutationSpec": _names("user_input_name"),
}


@functools.cache
def _fields(cls: type) -> dict[str, tuple[Any, bool]]:
    """Return the fields of a schema class: name -> (type, whether it is required)."""
    hints = typing.get_type_hints(cls, globalns=vars(schema))
    missing = dataclasses.MISSING
    return {
        field.name: (hints[field.name], field.default is missing and field.default_factory is missing)
        for field in dataclasses.fields(cls)
    }


def _malformed(expected: Any, value: Any) -> FileError:
    name = getattr(expected, "__name__", str(expected))
    return FileError(f"its description is malformed: {str(value)[:60]!r} is not the {name} that is needed there")


def _check_record(cls: type, value: Any) -> None:
    if not isinstance(value, dict):
        raise _malformed(cls, value)
    fields = _fields(cls)
    if issubclass(cls, _Union) and (len(value) != 1 or not value.keys() <= fields.keys()):
        raise _malformed(cls, value)
    for name, (kind, required) in fields.items():
        if name in value:
            check_schema(kind, value[name])
        elif required and not issubclass(cls, _Union):
            raise FileError(f"its description is malformed: {cls.__name__} lacks {name!r}")
    if check := _CHECKS.get(cls.__name__):
        check(value)


def _check_container(kind: Any, value: Any) -> None:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if type(None) in arguments:
        if value is not None:
            check_schema(arguments[0], value)
    elif origin not in (list, dict) or not isinstance(value, origin):
        raise _malformed(kind, value)
    else:
        for each in value if origin is list else value.values():
            check_schema(arguments[-1], each)


def check_schema(kind: Any, value: Any) -> None:
    """Check parsed JSON against a class of ``torch._export.serde.schema``: first types, then what strings may say.

    Raises UnsafeFileError if a string could run code, and FileError if the data is malformed.
    """
    # A kind is a container type, a union (one key), a dataclass, an enum of numbers, a float, or a plain JSON type.
    # A type must match exactly: True is not an int here.
    if isinstance(kind, str | typing.ForwardRef):
        kind = getattr(schema, kind if isinstance(kind, str) else kind.__forward_arg__)
    if not isinstance(kind, type) or typing.get_origin(kind) is not None:
        _check_container(kind, value)
    elif issubclass(kind, _Union) or dataclasses.is_dataclass(kind):
        _check_record(kind, value)
    elif issubclass(kind, IntEnum):
        if type(value) is not int or value not in {member.value for member in kind}:
            raise _malformed(kind, value)
    elif kind is float and (type(value) is int or value in ("Infinity", "-Infinity", "NaN")):
        return
    elif type(value) is not kind or (isinstance(value, int) and not -(2**63) <= value < 2**63):
        raise _malformed(kind, value)


def _expressions(value: Any) -> Iterator[str]:
    pending = [value]
    while pending:
        each = pending.pop()
        if isinstance(each, dict):
            pending.extend(each.values())
            if isinstance(found := each.get("expr_str"), str):
                yield found
        elif isinstance(each, list):
            pending.extend(each)


def check_program(program: Any) -> None:
    """Check the parsed ``models/model.json``: each part, and all parts together; raises as ``check_schema``."""
    check_schema(schema.ExportedProgram, program)
    check_expressions_in_all(_expressions(program), program["range_constraints"])
