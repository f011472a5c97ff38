"""Files whose payload would make the marker: pickles, strings that torch executes, names that it resolves."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from tests.hostile.builder import (
    CONSTANTS,
    MODEL,
    SAMPLES,
    WEIGHTS,
    Attack,
    Payload,
    edited,
    entries,
    graph,
    honest,
    inputs,
    saved,
    signature,
    touch,
    touch_unquoted,
    with_expression,
    with_json,
    with_text,
)

# -- pickles -----------------------------------------------------------------------------------------------------------


def pickled_weight(marker: Path) -> bytes:
    def change(config: Any) -> None:
        config["config"]["linear.weight"]["use_pickle"] = True
        config["config"]["linear.weight"]["path_name"] = "weight_9"

    return with_json(WEIGHTS, change, **{"data/weights/weight_9": saved(Payload(marker))})


def pickled_constant(marker: Path) -> bytes:
    def change(config: Any) -> None:
        config["config"]["constant"].update(use_pickle=True, path_name="tensor_9")

    return with_json(CONSTANTS, change, **{"data/constants/tensor_9": saved(Payload(marker))})


def opaque_constant(marker: Path) -> bytes:
    def change(config: Any) -> None:
        config["config"]["constant"].update(use_pickle=True, path_name="opaque_obj_0")

    return with_json(CONSTANTS, change, **{"data/constants/opaque_obj_0": pickle.dumps(Payload(marker), 2)})


def torchbind_constant(marker: Path) -> bytes:
    def change(config: Any) -> None:
        config["config"]["constant"].update(use_pickle=True, path_name="custom_obj_0")

    return with_json(CONSTANTS, change, **{"data/constants/custom_obj_0": saved(Payload(marker))})


def pickled_samples(marker: Path) -> bytes:
    return edited({SAMPLES: saved(((Payload(marker),), {}))})


def pickled_samples_old_format(marker: Path) -> bytes:
    return edited({SAMPLES: saved(((Payload(marker),), {}), _use_new_zipfile_serialization=False)})


def old_pickled_weights(marker: Path) -> bytes:
    return edited({"data/weights/model.pt": saved({"linear.weight": Payload(marker)})})


def old_pickled_constants(marker: Path) -> bytes:
    return edited({"data/constants/model.pt": saved({"constant": Payload(marker)})})


def old_archive(marker: Path) -> bytes:
    contents = entries(honest())
    payload = saved({"linear.weight": Payload(marker)})
    names = ("serialized_state_dict.pt", "serialized_constants.pt", "serialized_example_inputs.pt")
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("version", "8.20")
        archive.writestr("serialized_exported_program.json", contents[MODEL])
        for name in names:
            archive.writestr(name, payload)
    return stream.getvalue()


def pickled_module(marker: Path) -> bytes:
    return saved(Payload(marker))


def pickled_module_old_format(marker: Path) -> bytes:
    return saved(Payload(marker), _use_new_zipfile_serialization=False)


def pickle_in_state_dict(marker: Path) -> bytes:
    return saved({"state_dict": {"weight": torch.ones(2)}, "epoch": Payload(marker)})


def plain_pickle(marker: Path) -> bytes:
    return pickle.dumps(Payload(marker))


# -- strings that torch executes ---------------------------------------------------------------------------------------


def expression(marker: Path) -> bytes:
    return with_expression(touch(marker))


def guard(marker: Path) -> bytes:
    return with_json(MODEL, lambda parsed: parsed["guards_code"].append(touch(marker)))


def guard_comment(marker: Path) -> bytes:
    code = f"L['x'].size()[0] == 4 and {touch(marker)} #"
    return with_json(MODEL, lambda parsed: parsed["guards_code"].append(code))


def input_name(marker: Path) -> bytes:
    """``def forward(self, ..., NAME)`` is executed while loading, default values included."""
    return with_text('"mode"'[1:-1], f"mode, evil={touch(marker)}")


def value_name(marker: Path) -> bytes:
    return with_text("linear", f"linear = {touch_unquoted(marker)}; linear")


def lifted_name(marker: Path) -> bytes:
    """Inputs become arguments of ``forward``; a default value runs while loading."""
    return with_text("b_shift", f"b_shift=[{touch_unquoted(marker)}]")


def argument_names(marker: Path) -> bytes:
    def change(parsed: Any) -> None:
        signature(parsed)["forward_arg_names"] = ["x", "more", f"mode={touch(marker)}"]

    return with_json(MODEL, change)


def graph_name(marker: Path) -> bytes:
    return with_text("true_graph_0", f"true_graph_0; {touch_unquoted(marker)}; self")


def buffer_name(marker: Path) -> bytes:
    evil = f'x"), {touch_unquoted(marker)}, getattr(self, "y'

    def change(parsed: Any) -> None:
        for spec in parsed["graph_module"]["signature"]["input_specs"]:
            if "buffer" in spec:
                spec["buffer"]["buffer_name"] = evil

    return with_json(MODEL, change)


def constant_input(marker: Path) -> bytes:
    """A string input is compared by generated source: ``L['mode'] == 'TEXT'``."""
    evil = f"mode' and {touch(marker)} and 'mode"

    def change(parsed: Any) -> None:
        for each in graph(parsed)["inputs"]:
            if "as_string" in each:
                each["as_string"] = evil
        for spec in parsed["graph_module"]["signature"]["input_specs"]:
            if "constant_input" in spec:
                spec["constant_input"]["value"]["as_string"] = evil

    return with_json(MODEL, change)


def constant_input_as_number(marker: Path) -> bytes:
    """The same through a field whose type torch does not check."""

    def change(parsed: Any) -> None:
        given = graph(parsed)["inputs"]
        given[:] = [{"as_int": touch(marker)} if "as_string" in each else each for each in given]

    return with_json(MODEL, change)


def input_key(marker: Path) -> bytes:
    """The keys of dict inputs end up in the text of generated assertions."""
    evil = f'" + {touch_unquoted(marker)} + "'
    samples: Any = ((torch.ones(4, 4), {evil: torch.ones(4, 4)}, "mode"), {})

    def change(data: bytes) -> bytes:
        parsed = json.loads(data)
        parsed["guards_code"] = []
        spec = signature(parsed)
        spec["in_spec"] = spec["in_spec"].replace(json.dumps('["key"]'), json.dumps(json.dumps([evil])))
        return json.dumps(parsed).encode()

    return edited({MODEL: change, SAMPLES: saved(samples)})


def keyword_name(marker: Path) -> bytes:
    """Without ``forward_arg_names`` the keywords of the input structure become parameters, default values included."""
    evil = f"mode={touch_unquoted(marker)}"

    def change(data: bytes) -> bytes:
        parsed = json.loads(data)
        spec = signature(parsed)
        spec["forward_arg_names"] = None
        tree = json.loads(spec["in_spec"])
        args, kwargs = tree[1]["children_spec"]
        kwargs["children_spec"].append(args["children_spec"].pop())
        kwargs["context"] = json.dumps([evil])
        spec["in_spec"] = json.dumps(tree)
        return json.dumps(parsed).encode()

    return edited({MODEL: change, SAMPLES: saved((inputs()[:2], {"mode": "mode"}))})


def comment_end(_: Path) -> bytes:
    def change(parsed: Any) -> None:
        graph(parsed)["nodes"][0]["metadata"]["stack_trace"] = 'File "x", line 1, in y\n  1\rexec()'

    return with_json(MODEL, change)


# -- names that torch resolves -----------------------------------------------------------------------------------------


def target(name: str) -> Attack:
    def attack(_: Path) -> bytes:
        return with_text("torch.ops.aten.linear.default", name)

    return attack


def operator_argument(_: Path) -> bytes:
    def change(parsed: Any) -> None:
        graph(parsed)["nodes"][0]["inputs"][0]["arg"] = {"as_operator": "torch.hub.load"}

    return with_json(MODEL, change)


def _out_spec(spec: Any) -> bytes:
    return with_json(MODEL, lambda parsed: signature(parsed).update(out_spec=json.dumps([1, spec])))


def _leaf() -> dict[str, Any]:
    return {"type": None, "context": None, "children_spec": []}


def enum_import(marker: Path) -> bytes:
    """A context with an enum imports the module that it names."""
    (marker.parent / "evil_enum.py").write_text(f"open({str(marker)!r}, 'w').close()")
    enum = {"__enum__": True, "fqn": "evil_enum:Evil", "name": "x"}
    return _out_spec({"type": "builtins.dict", "context": json.dumps([enum]), "children_spec": [_leaf()]})


def factory_import(marker: Path) -> bytes:
    """The factory of a defaultdict is imported too."""
    (marker.parent / "evil_factory.py").write_text(f"open({str(marker)!r}, 'w').close()")
    context = {"default_factory_module": "evil_factory", "default_factory_name": "x", "dict_context": ["a"]}
    return _out_spec({"type": "collections.defaultdict", "context": context, "children_spec": [_leaf()]})


def unknown_type(_: Path) -> bytes:
    return _out_spec({"type": "somewhere.Strange", "context": "[]", "children_spec": [_leaf()]})


def metadata_reference(_: Path) -> bytes:
    def change(parsed: Any) -> None:
        graph(parsed)["nodes"][0]["metadata"]["source_fn_stack"] = "x,torch.nn.Module.__init__.__globals__"

    return with_json(MODEL, change)


def verifier(_: Path) -> bytes:
    return with_json(MODEL, lambda parsed: parsed.update(verifiers=["EVIL"]))
