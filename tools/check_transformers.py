"""Check that models of transformers survive surgery: one measured row for each model, which names what is wrong.

    .venv/bin/python tools/check_transformers.py

Each model is tiny, has random weights and is used as its class makes it (with caches). Four things are checked. At full
ranks the model gives the same outputs, and generates or classifies the same. Three steps of the Trainer with a switch
in the middle leave a dense model that has learnt. A factored model that save_pretrained wrote gives the same bits when
loaded by surgery's and by plain from_pretrained. Recompose restores the names and shapes of the original.
"""

from __future__ import annotations

import copy
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import surgery
from surgery.algebra import relative_error
from surgery.system.tables import table

VOCABULARY, LENGTH, ROWS = 50, 6, 8
ALLOWED = 1e-5  # relative error of the logits: float32 through a few dozen products
_SMALL: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}


def ids() -> Tensor:
    """Return a batch of tokens."""
    return torch.randint(1, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))


def make(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return a model with random weights, and a batch with labels."""
    import transformers as hf

    torch.manual_seed(0)
    tokens: dict[str, Tensor] = {"input_ids": ids(), "labels": ids()}
    if name == "Llama":
        config = hf.LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=1, tie_word_embeddings=True, **_SMALL)
        return hf.LlamaForCausalLM(config), tokens
    if name == "GPT-2":
        options: dict[str, Any] = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 16}
        return hf.GPT2LMHeadModel(
            hf.GPT2Config(vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0, **options)
        ), tokens
    if name == "T5":
        options = {"num_layers": 2, "num_heads": 2, "d_model": 16, "d_ff": 32, "d_kv": 8, "decoder_start_token_id": 0}
        return hf.T5ForConditionalGeneration(hf.T5Config(vocab_size=VOCABULARY, **options)), tokens
    labels, classes = torch.arange(ROWS) % 3, cast("dict[str, Any]", {"num_labels": 3})
    if name == "BERT":
        small = hf.BertConfig(vocab_size=VOCABULARY, max_position_embeddings=16, **_SMALL, **classes)
        return hf.BertForSequenceClassification(small), {"input_ids": ids(), "labels": labels}
    vision = hf.ViTConfig(image_size=16, patch_size=4, **_SMALL, **classes)
    return hf.ViTForImageClassification(vision), {"pixel_values": torch.randn(ROWS, 3, 16, 16), "labels": labels}


MODELS = ("Llama", "GPT-2", "T5", "BERT", "ViT")


def shapes(model: nn.Module) -> dict[str, Any]:
    """Return the shapes of a model's state by name."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the model's logits, in evaluation mode."""
    with torch.no_grad():
        found: Tensor = model.eval()(**batch).logits
    return found


def answers(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Return the answers that a user reads: generated tokens, or classes."""
    if model.can_generate():
        made: Tensor = model.eval().generate(batch["input_ids"], max_new_tokens=4, min_new_tokens=4, do_sample=False)
        return made
    return logits(model, batch).argmax(-1)


def check_full_rank(model: nn.Module, batch: dict[str, Tensor]) -> str:
    """Decompose at full ranks: the outputs are the same."""
    small = surgery.decompose(model, batch, ranks="full", factorization="svd").model
    error = relative_error(logits(small, batch), logits(model, batch))
    if error > ALLOWED:
        return f"error {error:.1e}"
    return "ok" if torch.equal(answers(small, batch), answers(model, batch)) else "other answers"


def check_training(model: nn.Module, batch: dict[str, Tensor]) -> str:
    """Train three steps with the Trainer: dense, factored, factored; the model must end dense, and have learnt."""
    from transformers import Trainer, TrainingArguments

    from surgery.training.huggingface import LowRankCallback

    model, before = copy.deepcopy(model).train(), shapes(model)
    rows = [{name: values[i] for name, values in batch.items()} for i in range(ROWS)]
    callback = LowRankCallback(batch, decompose_at=1, ranks=4, factorization="svd")
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, num_train_epochs=3, per_device_train_batch_size=ROWS, learning_rate=1e-2, use_cpu=True,
            report_to=[], disable_tqdm=True, logging_strategy="no", save_strategy="no",
        )  # fmt: skip
        start = float(model.eval()(**batch).loss)
        Trainer(model=model.train(), args=arguments, train_dataset=rows, callbacks=[callback]).train()
    kinds = [row.event.kind for row in callback.run.history.rows if row.event is not None]
    if "decompose" not in kinds or callback.run.phase != "recomposed":
        return f"no switch: {kinds}"
    if shapes(model) != before:
        return "other names or shapes"
    end = float(model.eval()(**batch).loss)
    return "ok" if end < start else f"loss {start:.3f} -> {end:.3f}"


def check_files(model: nn.Module, batch: dict[str, Tensor]) -> tuple[str, str, str]:
    """Save a factored model, load it in both ways, and recompose the loaded models."""
    small = surgery.decompose(model, batch, ranks=4, factorization="svd").model
    expected = logits(small, batch)
    with tempfile.TemporaryDirectory() as folder:
        small.save_pretrained(folder)
        ours, theirs = surgery.from_pretrained(folder), type(model).from_pretrained(folder)  # type: ignore[attr-defined]
        loaded = ["ok" if torch.equal(logits(m, batch), expected) else "other logits" for m in (ours, theirs)]
        back = surgery.recompose(ours, batch).model
        back.save_pretrained(folder)
        plain = "quantization_config" not in (Path(folder) / "config.json").read_text()
    error = relative_error(logits(back, batch), expected)
    right = shapes(back) == shapes(model) and plain and error <= ALLOWED
    return loaded[0], loaded[1], "ok" if right else f"error {error:.1e}, plain {plain}"


def row(name: str) -> list[str]:
    """Return the row of a model."""
    model, batch = make(name)
    ours, theirs, back = check_files(model.eval(), batch)
    return [name, check_full_rank(model, batch), check_training(model, batch), ours, theirs, back]


def lightning_row() -> list[str]:
    """Return the row of a Lightning module with an average of weights and early stopping."""
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging
    from torch.utils.data import DataLoader, TensorDataset

    from surgery.training.lightning import LowRankCallback

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Sequential(nn.Linear(16, 48), nn.ReLU(), nn.Linear(48, 4))

        def training_step(self, batch: Any, index: int) -> Tensor:
            return F.cross_entropy(self.model(batch[0]), batch[1])

        def validation_step(self, batch: Any, index: int) -> None:
            self.log("loss", F.cross_entropy(self.model(batch[0]), batch[1]))

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), 1e-2)

    torch.manual_seed(0)
    module, x = Module(), torch.randn(64, 16)
    y, before = (x @ torch.randn(16, 4)).argmax(1), shapes(module)
    loader = DataLoader(TensorDataset(x, y), batch_size=32)
    callback = LowRankCallback(x[:16], decompose_at=1, ranks=4, factorization="svd")
    start = float(F.cross_entropy(module.model(x), y))
    with tempfile.TemporaryDirectory() as folder:
        pl.Trainer(
            max_epochs=4, callbacks=[callback, EMAWeightAveraging(decay=0.8), EarlyStopping("loss", patience=4)],
            logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            accelerator="cpu", default_root_dir=folder,
        ).fit(module, loader, loader)  # fmt: skip
    end = float(F.cross_entropy(module.model(x), y))
    small = surgery.decompose(module.model, x, ranks=4, factorization="svd").model
    full = surgery.decompose(module.model, x, ranks="full", factorization="svd").model
    same = relative_error(full(x).detach(), module.model(x).detach()) <= ALLOWED
    with tempfile.TemporaryDirectory() as folder:
        surgery.save(small, Path(folder) / "model.safetensors")
        loaded = surgery.load(Path(folder) / "model.safetensors", model=lambda: Module().model)
    assert isinstance(loaded, nn.Module)
    came = torch.equal(loaded(x), small(x))
    back = surgery.recompose(loaded, x).model
    right = shapes(back) == shapes(module.model)
    trained = "ok" if end < start and shapes(module) == before else f"loss {start:.3f} -> {end:.3f}"
    return ["Lightning, EMA", _ok(same), trained, _ok(came), "-", _ok(right)]


def _ok(right: bool) -> str:
    return "ok" if right else "wrong"


def main() -> int:
    """Print the table; return 1 if a check fails."""
    import transformers

    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, surgery {surgery.__version__}")
    rows: list[Callable[[], list[str]]] = [*((lambda name=name: row(name)) for name in MODELS), lightning_row]
    found = [["model", "full ranks", "3 epochs, a switch", "load, ours", "load, plain", "recompose"]]
    for run in rows:
        found.append(run())
    print(table(found))
    return int(any(cell not in ("ok", "-") for line in found[1:] for cell in line[1:]))


if __name__ == "__main__":
    sys.exit(main())
