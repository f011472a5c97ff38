"""Loading by content and saving whole files: every kind of file, round trips, and crashes while saving."""

from __future__ import annotations

import functools
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from surgery.errors import FileError, InputError, SurgeryError, UnsafeFileError
from surgery.files.load import load
from surgery.files.save import save
from tests.hostile import builder


class Tied(nn.Module):
    """Two layers share a weight, as an embedding and a head do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.other = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.other.load_state_dict(self.first.state_dict())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.other(self.second(self.first(x)))


class Mixed(nn.Module):
    """Half precisions, a non-contiguous weight, an empty buffer, constants, keyword, dict and None inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.float16, self.brain = nn.Parameter(torch.randn(2).half()), nn.Parameter(torch.randn(2).bfloat16())
        self.slanted = nn.Parameter(torch.randn(4, 6).t()[1:5])
        self.layers = nn.ModuleDict({"a-b": nn.Linear(4, 4)})
        self.register_buffer("empty", torch.zeros(3, 0))
        self.register_buffer("counter", torch.zeros(1), persistent=False)

    def forward(self, x: torch.Tensor, *, mask: None, more: dict[str, Any]) -> dict[str, torch.Tensor]:
        self.counter.add_(1)
        total = self.float16.float().sum() + self.brain.float().sum() + self.slanted.sum() + self.empty.sum()
        y = self.layers["a-b"](x + more["a key"][1]) + torch.tensor([1.0, 2.0, 3.0, float("inf")]) * 0
        return {"out": y + total, "wide": torch.fft.rfft(x).abs()}


class Branches(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = torch.cond(x.sum() > 0, lambda t: t + 1, lambda t: t * 2, (x,))
        with torch.no_grad():
            z = x * 2
        half = x[: x.shape[0] // 2]
        return y, z, half, torch.cat([x, x[1:]]), x.reshape(-1), (x > 0).nonzero()


def _export(module: nn.Module, *args: Any, dynamic: Any = None, **kwargs: Any) -> torch.export.ExportedProgram:
    return torch.export.export(module.eval(), args, kwargs, dynamic_shapes=dynamic)


def _again(program: torch.export.ExportedProgram, folder: Path) -> torch.export.ExportedProgram:
    save(program, folder / "model.pt2")
    loaded = load(folder / "model.pt2")
    assert isinstance(loaded, torch.export.ExportedProgram)
    return loaded


def _same(one: Any, other: Any) -> bool:
    leaves = torch.utils._pytree.tree_leaves
    pairs = zip(leaves(one), leaves(other), strict=True)
    return all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs)


# -- round trips -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pt2", ".onnx", ""])
def test_a_program_comes_back(suffix: str, tmp_path: Path) -> None:
    program = builder.program()
    save(program, tmp_path / "saved.pt2")
    loaded = load((tmp_path / "saved.pt2").rename(tmp_path / f"model{suffix}"))  # the content tells the kind
    assert isinstance(loaded, torch.export.ExportedProgram)
    assert _same(loaded.module()(*builder.inputs()), program.module()(*builder.inputs()))
    assert str(loaded.range_constraints) == str(program.range_constraints)
    longer = (torch.ones(7, 4), {"key": torch.ones(7, 4)}, "mode")
    assert _same(loaded.module()(*longer), program.module()(*longer))
    with pytest.raises(AssertionError, match="Guard failed"):
        loaded.module()(torch.ones(7, 4), {"key": torch.ones(6, 4)}, "mode")


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    loaded = _again(_export(Tied(), torch.ones(2, 4)), tmp_path)
    weights = loaded.state_dict
    assert weights["first.weight"] is weights["second.weight"]
    assert isinstance(weights["first.weight"], nn.Parameter)
    assert weights["first.weight"] is not weights["other.weight"]  # equal values, but never tied
    module = loaded.module()
    assert module.first.weight is module.second.weight
    assert len({id(parameter) for parameter in module.parameters()}) == 5


def test_mixed_weights_and_inputs(tmp_path: Path) -> None:
    inputs = {"mask": None, "more": {"a key": (torch.ones(1), torch.ones(4))}}
    program = _export(Mixed(), torch.ones(6, 4), **inputs)
    loaded = _again(program, tmp_path)
    assert _same(loaded.module()(torch.ones(6, 4), **inputs), program.module()(torch.ones(6, 4), **inputs))
    assert loaded.state_dict["brain"].dtype == torch.bfloat16
    assert not loaded.state_dict["slanted"].is_contiguous()


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch.cond warns of torch's own pytree
def test_branches_and_dynamic_shapes(tmp_path: Path) -> None:
    program = _export(Branches(), torch.randn(8, 4), dynamic={"x": {0: torch.export.Dim.AUTO}})
    loaded = _again(program, tmp_path)
    x = torch.randn(10, 4)
    assert _same(loaded.module()(x), program.module()(x))
    assert _same(_again(loaded.run_decompositions(), tmp_path).module()(x), program.module()(x))


def test_the_record_comes_back(tmp_path: Path) -> None:
    program = _export(nn.Linear(2, 2), torch.ones(1, 2))
    assert "surgery" not in _again(program, tmp_path).graph_module.meta
    record = {"passes": [{"name": "decompose", "ranks": {"a.b": [3, 4], "é": None}}], "version": 1}
    program.graph_module.meta["surgery"] = record
    loaded = _again(program, tmp_path)
    assert loaded.graph_module.meta["surgery"] == record
    assert _again(loaded, tmp_path).graph_module.meta["surgery"] == record
    program.graph_module.meta["surgery"] = {"not JSON": torch.ones(1)}
    with pytest.raises(InputError, match="record"):
        save(program, tmp_path / "model.pt2")
    assert load(tmp_path / "model.pt2").graph_module.meta["surgery"] == record


def test_extra_files_of_others_are_tolerated(tmp_path: Path) -> None:
    program = _export(nn.Linear(2, 2), torch.ones(1, 2))
    torch.export.save(program, tmp_path / "model.pt2", extra_files={"notes.txt": "mine", "folder/more.json": "{"})
    assert isinstance(load(tmp_path / "model.pt2"), torch.export.ExportedProgram)


@functools.cache
def _bert_program() -> torch.export.ExportedProgram:
    """Return an exported model of transformers, made once."""
    return _export(*_bert(pytest.importorskip("transformers")))


def _bert(t: Any) -> tuple[nn.Module, torch.Tensor]:
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = t.BertConfig(vocab_size=50, max_position_embeddings=16, **small)
    return t.BertModel(config), torch.randint(0, 50, (2, 8))


def _gpt2(t: Any) -> tuple[nn.Module, torch.Tensor]:
    tokens = {"bos_token_id": 1, "eos_token_id": 2}
    config = t.GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=16, use_cache=False, **tokens)
    return t.GPT2LMHeadModel(config), torch.randint(0, 50, (2, 8))


def _resnet(t: Any) -> tuple[nn.Module, torch.Tensor]:
    config = t.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=5)
    return t.ResNetForImageClassification(config), torch.randn(2, 3, 32, 32)


def _swin(t: Any) -> tuple[nn.Module, torch.Tensor]:
    size = {"image_size": 32, "patch_size": 4, "window_size": 4}
    config = t.SwinConfig(embed_dim=8, depths=[1, 1], num_heads=[1, 2], num_labels=5, **size)
    return t.SwinForImageClassification(config), torch.randn(2, 3, 32, 32)


@pytest.mark.filterwarnings("ignore")  # the library's own
@pytest.mark.parametrize("make", [_bert, _gpt2, _resnet, _swin])
def test_transformers_models(make: Callable[[Any], tuple[nn.Module, torch.Tensor]], tmp_path: Path) -> None:
    module, x = make(pytest.importorskip("transformers"))
    program = _bert_program() if make is _bert else _export(module, x)
    loaded = _again(program, tmp_path)
    found, expected = loaded.module()(x), program.module()(x)
    assert type(found) is type(expected)
    assert _same(found, expected)
    if make is _gpt2:
        assert loaded.state_dict["lm_head.weight"] is loaded.state_dict["transformer.wte.weight"]


@pytest.mark.filterwarnings("ignore")
def test_output_classes_of_transformers_are_imported_when_needed(tmp_path: Path) -> None:
    save(_bert_program(), tmp_path / "bert.pt2")
    code = """
import sys, surgery.passes.decompose
from surgery.files.load import load
assert "torch._dynamo" not in sys.modules, "torch's compiler, half a second"
load(sys.argv[1])
print("ok")
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "bert.pt2"], capture_output=True, text=True)
    assert done.stdout == "ok\n", done.stderr


# -- state dicts and modules -------------------------------------------------------------------------------------------


def _net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.Dropout(), nn.Linear(3, 2))


_WRAPPINGS: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
    "plain": lambda weights: weights,
    "state_dict": lambda weights: {"state_dict": weights, "epoch": 3},
    "model": lambda weights: {"model": weights, "lr": 0.1},
    "parallel": lambda weights: {f"module.{name}": tensor for name, tensor in weights.items()},
    "compiled": lambda weights: {"model": {f"module._orig_mod.{name}": tensor for name, tensor in weights.items()}},
}


@pytest.mark.parametrize("old_format", [False, True])
@pytest.mark.parametrize("wrapping", _WRAPPINGS)
def test_a_state_dict_with_its_factory(wrapping: str, old_format: bool, tmp_path: Path) -> None:
    net = _net()
    wrapped = _WRAPPINGS[wrapping](net.state_dict())
    torch.save(wrapped, tmp_path / "weights", _use_new_zipfile_serialization=not old_format)
    loaded = load(tmp_path / "weights", model=_net)
    assert isinstance(loaded, nn.Module)
    assert not loaded.training
    assert _same(loaded(torch.ones(1, 4)), net.eval()(torch.ones(1, 4)))


def test_safetensors_with_a_factory_from_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = _net()
    safetensors.torch.save_file(net.state_dict(), tmp_path / "weights.bin")
    lines = ["from torch import nn", "", "def net():", "    return nn.Sequential(", "        nn.Linear(4, 3),"]
    (tmp_path / "made_here.py").write_text("\n".join([*lines, "        nn.Dropout(), nn.Linear(3, 2))", "LIST = []"]))
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    loaded = load("weights.bin", model="made_here:net")
    assert sys.path == before
    assert _same(loaded(torch.ones(1, 4)), net.eval()(torch.ones(1, 4)))
    for name in ("made_here", "made_here:absent", "made_here:LIST", "absent:net", ":", "made_here:net.x"):
        with pytest.raises(InputError, match=r"weights\.bin"):
            load("weights.bin", model=name)


def _stops() -> nn.Module:
    raise SystemExit(3)


@pytest.mark.parametrize("model", [_stops, dict, lambda: 1 / 0, lambda x: x])
def test_a_factory_that_fails_is_an_input_error(model: Any, tmp_path: Path) -> None:
    torch.save(_net().state_dict(), tmp_path / "weights.pt")
    with pytest.raises(InputError, match="factory"):
        load(tmp_path / "weights.pt", model=model)


def test_a_state_dict_needs_a_factory_that_fits(tmp_path: Path) -> None:
    torch.save(_net().state_dict(), tmp_path / "weights.pt")
    with pytest.raises(InputError, match=r"--model package\.module:factory"):
        load(tmp_path / "weights.pt")
    with pytest.raises(FileError, match=r"missing: 1\.weight, 1\.bias.*unexpected: 2\.weight.*\[3, 4\] for \[5, 4\]"):
        load(tmp_path / "weights.pt", model=lambda: nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 1)))
    torch.save([torch.ones(1)], tmp_path / "list.pt")
    with pytest.raises(FileError, match="list"):
        load(tmp_path / "list.pt", model=_net)


def test_a_pickled_module_needs_trust(tmp_path: Path) -> None:
    for module in (_net(), torch.fx.symbolic_trace(_net())):
        torch.save(module, tmp_path / "module.pt")
        with pytest.raises(UnsafeFileError, match=r"state_dict\(\).*--trust"):
            load(tmp_path / "module.pt")
        loaded = load(tmp_path / "module.pt", trust=True)
        assert isinstance(loaded, nn.Sequential if type(module) is nn.Sequential else torch.fx.GraphModule)
        assert _same(loaded.eval()(torch.ones(1, 4)), module.eval()(torch.ones(1, 4)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_torchscript_needs_trust_and_inputs(tmp_path: Path) -> None:
    net = _net().eval()
    torch.jit.save(torch.jit.trace(net, torch.ones(2, 4)), tmp_path / "script.pt")
    with pytest.raises(UnsafeFileError, match=r"TorchScript.*torch\.export\.export.*--trust"):
        load(tmp_path / "script.pt")
    with pytest.raises(InputError, match="example_inputs"):
        load(tmp_path / "script.pt", trust=True)
    program = load(tmp_path / "script.pt", trust=True, example_inputs=(torch.ones(2, 4),))
    assert isinstance(program, torch.export.ExportedProgram)
    assert torch.allclose(program.module()(torch.ones(2, 4)), net(torch.ones(2, 4)))
    with pytest.raises(FileError, match="convert"):
        load(tmp_path / "script.pt", trust=True, example_inputs=("text",))


def test_an_archive_of_torch_2_7_needs_trust(tmp_path: Path) -> None:
    program = builder.program()
    contents = {
        "version": b"8.8",
        "serialized_exported_program.json": builder.entries(builder.honest())[builder.MODEL],
        "serialized_state_dict.pt": builder.saved(program.state_dict),
        "serialized_constants.pt": builder.saved(program.constants),
        "serialized_example_inputs.pt": builder.saved(program.example_inputs),
    }
    with zipfile.ZipFile(tmp_path / "old.pt2", "w") as archive:
        for name, data in contents.items():
            archive.writestr(name, data)
    with pytest.raises(UnsafeFileError, match=r"torch 2\.7 .*--trust"):
        load(tmp_path / "old.pt2")
    loaded = load(tmp_path / "old.pt2", trust=True)
    assert isinstance(loaded, torch.export.ExportedProgram)
    assert _same(loaded.module()(*builder.inputs()), program.module()(*builder.inputs()))


# -- what is not a model -----------------------------------------------------------------------------------------------


def _onnx(path: Path) -> None:
    import onnx

    graph = onnx.helper.make_graph([], "empty", [], [])
    onnx.save(onnx.helper.make_model(graph), path)


def _zip_of_text(path: Path) -> None:
    path.write_bytes(builder.pack({"notes.txt": b"text"}))


_NO_MODELS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda path: None, "does not exist"),
    "folder": (Path.mkdir, "is a folder"),
    "empty": (Path.touch, "is empty"),
    "text": (lambda path: path.write_text("a letter\nto you, dear é\n"), "is a text file"),
    "cut off": (lambda path: path.write_bytes(builder.honest()[:5000]), "cut off"),
    "onnx": (_onnx, "it has no graph"),
    "zip": (_zip_of_text, "but not a model"),
    "bytes": (lambda path: path.write_bytes(bytes(range(256))), "is not a model file"),
    "pickle": (lambda path: path.write_bytes(pickle.dumps([1])), "is a pickle"),
    "pipe": (lambda path: os.mkfifo(path), "is not a regular file"),
    "safetensors cut off": (lambda path: path.write_bytes(safetensors.torch.save({"a": torch.ones(9)})[:-5]), "cannot"),
}


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize("name", _NO_MODELS)
def test_what_is_no_model_is_one_clear_error(name: str, trust: bool, tmp_path: Path) -> None:
    make, said = _NO_MODELS[name]
    path = tmp_path / "model.pt2"
    make(path)
    with pytest.raises(FileError, match=said) as caught:
        load(path, trust=trust, model=_net)
    assert str(path) in str(caught.value)
    assert str(caught.value).isprintable()


def test_whatever_torch_raises_is_one_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.pt2").write_bytes(builder.honest())

    def fail(error: BaseException) -> Callable[[Any], Any]:
        def raise_it(_: Any) -> Any:
            raise error

        return raise_it

    for error in (MemoryError(), RecursionError("deep"), KeyError("x\ny"), AssertionError(), SystemExit(1)):
        monkeypatch.setattr("torch.export.pt2_archive._package.load_pt2", fail(error))
        with pytest.raises(SurgeryError, match=r"model\.pt2"):
            load(tmp_path / "model.pt2")
    monkeypatch.setattr("torch.export.pt2_archive._package.load_pt2", fail(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        load(tmp_path / "model.pt2")
