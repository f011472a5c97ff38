"""How a module is called, by its ``forward`` and by example inputs."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from surgery.kinds.inputs import Inputs
from surgery.kinds.signature import Declared, Signature

__all__ = ["declared_inputs", "given_inputs", "read_signature"]


def read_signature(model: nn.Module, example: Inputs) -> Signature:
    """Return how a module is called."""
    parameters = inspect.signature(model.forward).parameters.values()
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    plain = [p for p in parameters if p.kind not in variadic]
    names = [p.name for p in plain]
    needed = [p.name for p in plain if p.default is p.empty]
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters)
    taken = len(example[0]) or len(needed) or len(names)
    return Signature(tuple(names), taken, frozenset(needed), open_ended=open_ended)


def given_inputs(example: Inputs, signature: Signature) -> dict[str, Any]:
    """Return example inputs by name."""
    args, kwargs = example
    return dict(zip(signature.names, args, strict=False)) | kwargs


def declared_inputs(model: nn.Module, example: Inputs, signature: Signature) -> dict[str, Declared]:
    """Return what is known of the inputs that are tensors, by name, from the example inputs."""
    return {
        name: Declared(value.dtype, (None,) * value.dim(), tuple(value.shape), _ids(model, name))
        for name, value in given_inputs(example, signature).items()
        if isinstance(value, Tensor)
    }


def _ids(model: nn.Module, name: str) -> int | None:
    """Return how many ids a model of Hugging Face transformers knows."""
    embeddings: Any = getattr(model, "get_input_embeddings", None)
    if name != "input_ids" or embeddings is None:
        return None
    known = getattr(embeddings(), "num_embeddings", None)
    return known if isinstance(known, int) else None
