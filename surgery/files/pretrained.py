"""Factored models of Hugging Face transformers: ``save_pretrained`` saves them, and ``from_pretrained`` loads them.

The record of a factored model is in its ``config.json``, as the settings of a quantization method named ``surgery``.
transformers calls the quantizer of that name, which is ours, on the model on the meta device, before it loads the
weights; the quantizer gives the model its factored layers. It must be registered first: ``import surgery`` registers it
as soon as transformers is imported (``watch_imports``).
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from surgery.errors import FileError, InputError, SurgeryError, only_own_errors
from surgery.system.opening import check_path
from surgery.text import first_line

__all__ = ["from_pretrained", "note_record", "watch_imports"]

METHOD = "surgery"
_REGISTRY = "transformers.quantizers.auto"


@only_own_errors
def from_pretrained(folder: str | os.PathLike[str], **kwargs: Any) -> Any:
    """Return the factored model that ``save_pretrained`` saved in a folder, as an instance of its original class.

    ``kwargs`` go to transformers' own ``from_pretrained``, which also works by itself once ``surgery`` is imported.

    Raises:
        InputError: transformers is not installed.
        FileError: the folder has no configuration that names a class of transformers, or the model cannot be loaded.

    >>> model = from_pretrained("factored-gpt2")  # doctest: +SKIP
    """
    check_path(folder)
    try:
        import transformers
    except ImportError as error:
        raise InputError(
            "surgery.from_pretrained needs transformers", next_step="pip install 'model-surgery[huggingface]'"
        ) from error
    _register(importlib.import_module(_REGISTRY))
    file = Path(folder) / "config.json"
    try:
        names = json.loads(file.read_text())["architectures"]
        kind = getattr(transformers, names[0])
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        what = f"{file}: names no class of transformers that can be loaded"
        raise FileError(what, allowed="a folder that save_pretrained wrote") from error
    try:
        return kind.from_pretrained(folder, **kwargs)
    except SurgeryError:
        raise
    except Exception as error:  # the readers of the weights raise errors of their own types
        raise FileError(f"{folder}: {kind.__name__} cannot be loaded: {first_line(error)}") from error


def note_record(model: Any) -> None:
    """Put the record of a transformers model into its configuration, or remove it if nothing is factored."""
    module = sys.modules.get("transformers")
    kind = getattr(module, "PreTrainedModel", None) if module is not None else None
    if kind is None or not isinstance(model, kind):
        return
    from surgery.files.structure import record_of

    record = record_of(model)
    own = getattr(getattr(model.config, "quantization_config", None), "quant_method", None) == METHOD
    if record.sites:
        registry = importlib.import_module(_REGISTRY)
        _register(registry)
        model.config.quantization_config = registry.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD](record.to_json())
    elif own:
        del model.config.quantization_config
        for name in ("hf_quantizer", "quantization_method", "is_quantized"):
            vars(model).pop(name, None)


def watch_imports() -> None:
    """Register our quantizer as soon as transformers' registry is imported; this imports nothing itself."""
    if _REGISTRY in sys.modules:
        _register(sys.modules[_REGISTRY])
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the module of transformers' registry as Python does, and adds our quantizer once it is loaded."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return the spec of the registry's module with our loader; None for any other module."""
        if fullname != _REGISTRY:
            return None
        # Before the search, which would come here again.
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    """Loads the registry with its own loader, and then registers our quantizer."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        """Return what the registry's own loader creates."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Run the module, then register our quantizer in it."""
        self._loader.exec_module(module)
        _register(module)


def _register(registry: ModuleType) -> None:
    """Add our configuration and our quantizer to transformers' registry, once."""
    if METHOD in registry.AUTO_QUANTIZER_MAPPING:
        return
    mixin: Any = registry.QuantizationConfigMixin
    base: Any = registry.HfQuantizer

    class SurgeryConfig(mixin):  # type: ignore[misc]
        """The record of a factored model, as transformers keeps it in config.json."""

        def __init__(self, record: Any = None, **kwargs: Any) -> None:
            self.quant_method = METHOD
            self.record = record
            self.note = "layers are factored: import surgery (package model-surgery) before from_pretrained"

    class SurgeryQuantizer(base):  # type: ignore[misc]
        """Gives a model its factored layers before its weights are loaded."""

        requires_calibration = False

        def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
            from surgery.files.structure import give_structure
            from surgery.sites import Record

            record = Record.from_json(self.quantization_config.record).check()
            give_structure(model, _own_sites(model, record.origins))
            _tie_structure(model, record.ties)
            return model

        def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
            for name in ("hf_quantizer", "quantization_method", "is_quantized"):
                vars(model).pop(name, None)  # transformers then trains, moves and saves it as any other model
            return model

        def is_serializable(self, **kwargs: Any) -> bool:
            return True

        @property
        def is_trainable(self) -> bool:
            return True

    registry.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = SurgeryConfig
    registry.AUTO_QUANTIZER_MAPPING[METHOD] = SurgeryQuantizer


def _own_sites(model: Any, sites: Any) -> dict[str, Any]:
    """Return the sites by their names in this model, which may have a head or not: the prefix differs."""
    # GPT-2 with a head has the site transformer.h.0.mlp.c_fc, and its base model has h.0.mlp.c_fc.
    names = {name for name, _ in model.named_modules()}
    prefix = f"{model.base_model_prefix}."
    found = {}
    for site, origin in sites.items():
        own = next((name for name in (site, site.removeprefix(prefix), prefix + site) if _is_in(name, names)), None)
        if own is not None:
            found[own] = origin
    return found


def _is_in(name: str, names: set[str]) -> bool:
    """Whether a model has a layer of this name, or a packed layer of which it is one part."""
    parent, _, leaf = name.rpartition(".")
    packed = leaf.startswith(("in_proj_", "ih_l", "hh_l", "hr_l"))
    return name in names or (packed and parent in names)


def _tie_structure(model: Any, ties: Sequence[Sequence[str]]) -> None:
    """Make parameters of equal shape at these names one parameter; on the meta device they have no values yet."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for names in ties:
        places = [(modules.get(path), leaf) for path, _, leaf in (name.rpartition(".") for name in names)]
        owners = [
            (module, leaf) for module, leaf in places if module is not None and module._parameters.get(leaf) is not None
        ]
        for module, leaf in owners[1:]:
            first = owners[0][0]._parameters[owners[0][1]]
            if module._parameters[leaf].shape == first.shape:
                module._parameters[leaf] = first
