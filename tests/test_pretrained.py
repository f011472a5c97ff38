"""Models of transformers as they come: decomposed, generated with, trained, saved, loaded, recomposed, and combined."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import surgery
from surgery.algebra import relative_error
from surgery.errors import SurgeryError
from tools import check_transformers as tool

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # of transformers, peft, torchao and Lightning, about each other
    pytest.mark.xdist_group("transformers"),
]


@pytest.mark.law
@pytest.mark.parametrize("name", tool.MODELS)
def test_every_cell_of_the_table_is_right(name: str) -> None:
    assert set(tool.row(name)[1:]) == {"ok"}


def test_a_lightning_module_with_an_average_and_early_stopping() -> None:
    assert set(tool.lightning_row()[1:]) == {"ok", "-"}


@pytest.fixture(scope="module")
def gpt2() -> tuple[nn.Module, Any, dict[str, torch.Tensor]]:
    model, batch = tool.make("GPT-2")
    batch = {"input_ids": batch["input_ids"]}
    return model.eval(), surgery.decompose(model.eval(), batch, ranks=4, factorization="svd").model, batch


@pytest.mark.parametrize("first", ["surgery", "transformers"])
def test_a_fresh_process_loads_what_was_saved(gpt2: Any, first: str, tmp_path: Path) -> None:
    _, small, batch = gpt2
    small.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    torch.save({"batch": batch, "logits": tool.logits(small, batch)}, tmp_path / "seen.pt")
    second = "transformers" if first == "surgery" else "surgery"
    code = f"""
import {first}, {second}, torch
seen = torch.load({str(tmp_path / "seen.pt")!r})
model = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}).eval()
print(bool(torch.equal(model(**seen["batch"]).logits, seen["logits"])))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("True")
    assert "MISSING" not in done.stderr


def test_importing_surgery_imports_no_transformers() -> None:
    code = "import sys, surgery; print('transformers' in sys.modules, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_a_loaded_model_is_cut_again_and_saved_again(gpt2: Any, tmp_path: Path) -> None:
    _, small, batch = gpt2
    small.save_pretrained(tmp_path / "once")
    loaded = surgery.from_pretrained(tmp_path / "once").eval()
    twice = surgery.decompose(loaded, batch, ranks=2).model
    twice.save_pretrained(tmp_path / "twice")
    assert torch.equal(tool.logits(surgery.from_pretrained(tmp_path / "twice"), batch), tool.logits(twice, batch))
    half = surgery.from_pretrained(tmp_path / "once", dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_a_folder_that_is_none_is_one_error(tmp_path: Path) -> None:
    for text in ("", "{", "[]", '{"architectures": ["NoSuchModel"]}', '{"architectures": ["GPT2LMHeadModel"]}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(SurgeryError):
            surgery.from_pretrained(tmp_path)


def test_embeddings_are_resized(gpt2: Any) -> None:
    _, small, batch = gpt2
    small = copy.deepcopy(small)
    small.resize_token_embeddings(tool.VOCABULARY + 6)
    expected = tool.logits(gpt2[1], batch)
    assert torch.equal(tool.logits(small, batch)[..., : tool.VOCABULARY], expected)


def test_adapters_on_the_factors_train_and_merge(gpt2: Any) -> None:
    from peft import LoraConfig, get_peft_model

    _, small, batch = gpt2
    small, expected = copy.deepcopy(small), tool.logits(gpt2[1], batch)
    tuned = get_peft_model(small, LoraConfig(target_modules=r".*c_attn\.[01]", r=2, init_lora_weights=False))
    adapted = tool.logits(tuned, batch)
    assert relative_error(adapted, expected) > 1e-3
    tuned(**batch).logits.sum().backward()
    merged = tuned.merge_and_unload()
    assert relative_error(tool.logits(merged, batch), adapted) <= tool.ALLOWED
    back = surgery.recompose(merged, batch)
    assert relative_error(tool.logits(back.model, batch), adapted) <= tool.ALLOWED


def test_an_adapter_whose_base_is_factored_is_not_merged_into_nothing() -> None:
    from peft import LoraConfig, get_peft_model

    net = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))
    tuned, x = get_peft_model(net, LoraConfig(target_modules=["0"], r=2, init_lora_weights=False)), torch.randn(4, 16)
    small = surgery.decompose(tuned, x, ranks="full", factorization="svd", include=("*base_layer*",)).model
    expected = tuned(x)
    assert relative_error(small(x).detach(), expected.detach()) <= tool.ALLOWED
    with pytest.raises(SurgeryError, match="factored"):
        small.merge_and_unload()
    back = surgery.recompose(small, x).model
    assert relative_error(back.merge_and_unload()(x).detach(), expected.detach()) <= tool.ALLOWED


def test_factors_are_quantized_and_compiled(gpt2: Any) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    _, small, batch = gpt2
    expected = tool.logits(small, batch)
    compiled: Any = torch.compile(small, backend="eager")
    assert relative_error(tool.logits(compiled, batch), expected) <= tool.ALLOWED
    coarse = copy.deepcopy(small)
    quantize_(coarse, Int8WeightOnlyConfig())
    assert relative_error(tool.logits(coarse, batch), expected) < 0.05
    assert "quantized" in surgery.recompose(coarse, batch).skips[0].reason
