"""The callbacks in the real trainers: they switch, keep the optimizer, and resume from checkpoints bit for bit."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from surgery.errors import InputError
from tests.tolerances import assert_close, tolerance
from tests.training_cases import RANKS, Net, batch

EPOCHS = 4
SETTINGS: dict[str, Any] = {"decompose_at": 2, "recompose_at": "end", "ranks": RANKS}

pytestmark = [
    # the libraries' own, which no caller can help
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]


def same(first: nn.Module, second: nn.Module) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def lightning() -> Any:
    pytest.importorskip("lightning", reason="Lightning is not installed")
    from lightning import pytorch

    return pytorch


def lightning_module(pytorch: Any, seed: int = 0) -> Any:
    class Classifier(pytorch.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(seed)
            self.network = Net()

        def training_step(self, data: Any, index: int) -> Tensor:
            return nn.functional.cross_entropy(self.network(data[0]), data[1])

        def validation_step(self, data: Any, index: int) -> None:
            self.log("accuracy", (self.network(data[0]).argmax(1) == data[1]).float().mean())

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
            return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=EPOCHS)]

        def on_train_batch_start(self, data: Any, index: int) -> None:
            torch.manual_seed(self.global_step)  # dropout: Lightning does not restore the random state

    return Classifier()


def lightning_trainer(pytorch: Any, folder: Path, callback: Any, *, epochs: int = EPOCHS, **options: Any) -> Any:
    from lightning.pytorch.callbacks import ModelCheckpoint

    every = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return pytorch.Trainer(max_epochs=epochs, callbacks=[every, callback], gradient_clip_val=1.0, **quiet, **options)


def fit(pytorch: Any, folder: Path, *, seed: int = 0, epochs: int = EPOCHS, path: Any = None) -> tuple[Any, Any, Any]:
    from surgery.training.lightning import LowRankCallback

    data = DataLoader(TensorDataset(*batch(size=24)), batch_size=8)
    module = lightning_module(pytorch, seed)
    callback = LowRankCallback(batch(size=8)[0], module="network", monitor="accuracy", **{"epochs": EPOCHS, **SETTINGS})
    trainer = lightning_trainer(pytorch, folder, callback, epochs=epochs)
    trainer.fit(module, data, data, ckpt_path=path)
    return module, callback, trainer


def test_lightning_switches_and_keeps_its_optimizer(lightning: Any, tmp_path: Path) -> None:
    module, callback, trainer = fit(lightning, tmp_path)
    run = callback.run
    assert [event.kind for event in run.history.events] == ["decompose", "recompose"]
    assert [row.phase for row in run.history] == ["dense"] * 2 + ["factored"] * 2
    assert [row.steps for row in run.history] == [3] * EPOCHS
    assert all(row.accuracy is not None for row in run.history)
    assert run.optimizer is trainer.optimizers[0]
    assert run.model is module.network
    assert {id(p) for p in module.parameters()} == {id(p) for g in run.optimizer.param_groups for p in g["params"]}
    assert not run.optimizer._optimizer_step_post_hooks
    fresh = Net()
    fresh.load_state_dict(module.network.state_dict(), strict=True)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-9)


def test_lightning_resumes_bit_for_bit(lightning: Any, tmp_path: Path, subtests: pytest.Subtests) -> None:
    whole, done, _ = fit(lightning, tmp_path / "whole")
    for stop in (1, 2, 3):
        with subtests.test(stop=stop):
            path = tmp_path / "whole" / f"epoch={stop - 1}.ckpt"
            checkpoint = torch.load(path, weights_only=True)
            strict = lightning_module(lightning, 5)
            strict.load_state_dict(checkpoint["state_dict"], strict=True)
            again, callback, _ = fit(lightning, tmp_path / f"from {stop}", seed=7, path=path)
            assert same(again, whole)
            assert [row.phase for row in callback.run.history] == [row.phase for row in done.run.history]
            assert callback.run.history.events[0].changes == done.run.history.events[0].changes


def test_lightning_checkpoints_compose_the_factors(lightning: Any, tmp_path: Path) -> None:
    module, callback, _ = fit(lightning, tmp_path, epochs=3)
    assert callback.run.phase == "recomposed"  # the fit has ended early
    checkpoint = torch.load(tmp_path / "epoch=2.ckpt", weights_only=True)
    dense = lightning_module(lightning, 5)
    dense.load_state_dict(checkpoint["state_dict"], strict=True)
    x = batch(seed=3)[0]
    assert_close(dense.network.eval()(x), module.network.eval()(x), tolerance(torch.float32, length=72, steps=4))


def test_lightning_refusals_are_clear(lightning: Any, tmp_path: Path) -> None:
    from surgery.training.lightning import LowRankCallback

    callback = LowRankCallback(batch()[0], **SETTINGS)
    with pytest.raises(InputError, match="not begun"):
        _ = callback.run
    data = DataLoader(TensorDataset(*batch(size=24)), batch_size=8)
    with pytest.raises(InputError, match="allowed: network"):
        lightning_trainer(lightning, tmp_path, callback).fit(lightning_module(lightning), data, data)


@pytest.fixture
def transformers() -> Any:
    library = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    return library


def tokens(count: int = 24) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(30, (count, 6), generator=generator)
    return [{"input_ids": row, "labels": int(row[0]) % 3} for row in rows]


def bert(transformers: Any, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BertConfig(vocab_size=30, max_position_embeddings=8, num_labels=3, **sizes)
    return transformers.BertForSequenceClassification(config)


def huggingface(transformers: Any, folder: Path, *, seed: int = 0, path: Any = None) -> tuple[Any, Any, Any]:
    from surgery.training.huggingface import LowRankCallback

    arguments = transformers.TrainingArguments(
        str(folder),
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=8,
        save_strategy="epoch" if path is None else "no",
        learning_rate=1e-2,
        weight_decay=0.01,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        logging_strategy="no",
    )
    model = bert(transformers, seed)
    settings = {**SETTINGS, "ranks": {"*.dense": 4, "*.query": 4}, "factorization": "svd"}
    callback = LowRankCallback({"input_ids": torch.stack([row["input_ids"] for row in tokens(8)])}, **settings)
    trainer = transformers.Trainer(model, arguments, train_dataset=tokens(), callbacks=[callback])
    trainer.train(resume_from_checkpoint=path)
    return model, callback, trainer


def test_huggingface_switches_and_keeps_its_optimizer(transformers: Any, tmp_path: Path) -> None:
    model, callback, trainer = huggingface(transformers, tmp_path)
    run = callback.run
    assert [event.kind for event in run.history.events] == ["decompose", "recompose"]
    assert [row.phase for row in run.history] == ["dense"] * 2 + ["factored"] * 2
    assert [row.steps for row in run.history] == [3] * EPOCHS
    assert run.optimizer is trainer.optimizer.optimizer
    assert run.model is model
    assert {id(p) for p in model.parameters()} == {id(p) for g in run.optimizer.param_groups for p in g["params"]}
    assert not run.optimizer._optimizer_step_post_hooks
    bert(transformers, 4).load_state_dict(model.state_dict(), strict=True)


def test_huggingface_resumes_bit_for_bit(transformers: Any, tmp_path: Path, subtests: pytest.Subtests) -> None:
    whole, done, _ = huggingface(transformers, tmp_path / "whole")
    for stop in (1, 2, 3):
        with subtests.test(stop=stop):
            checkpoint = tmp_path / "whole" / f"checkpoint-{3 * stop}"
            loaded = transformers.BertForSequenceClassification.from_pretrained(checkpoint)
            assert loaded.state_dict().keys() == whole.state_dict().keys()
            again, callback, _ = huggingface(transformers, tmp_path / "whole", seed=7, path=checkpoint)
            assert same(again, whole)
            assert [row.phase for row in callback.run.history] == [row.phase for row in done.run.history]


def test_huggingface_refusals_are_clear(transformers: Any, tmp_path: Path) -> None:
    from surgery.training.huggingface import STATE_NAME, LowRankCallback

    with pytest.raises(InputError, match="not begun"):
        _ = LowRankCallback(batch()[0]).run
    huggingface(transformers, tmp_path)
    checkpoint = tmp_path / "checkpoint-6"
    (checkpoint / STATE_NAME).unlink()
    with pytest.raises(InputError, match=STATE_NAME):
        huggingface(transformers, tmp_path, path=checkpoint)


@pytest.mark.parametrize(("module", "library"), [("lightning", "lightning"), ("huggingface", "transformers")])
def test_an_absent_library_is_one_clear_error(module: str, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"surgery.training.{module}"
    monkeypatch.delitem(sys.modules, name, raising=False)
    for key in [key for key in sys.modules if key == library or key.startswith(f"{library}.")]:
        monkeypatch.delitem(sys.modules, key)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(InputError, match="pip install"):
        __import__(name)
