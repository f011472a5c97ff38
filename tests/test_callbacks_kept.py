"""What trainers keep beside the model: averages of its weights, the best of its checkpoints, copies of their own."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

from surgery.errors import InputError
from tests.covering import ALL
from tests.training_cases import Net, batch

EPOCHS = 4
SETTINGS: dict[str, Any] = {"decompose_at": 1, "ranks": {"hidden": 4, "second": (4, 4)}, "module": "network"}
DATA = batch(size=24)

pytestmark = [
    # the libraries' own, which no caller can help
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists"),
    pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback"),
]


@pytest.fixture
def lightning() -> Any:
    pytest.importorskip("lightning", reason="Lightning is not installed")
    from lightning import pytorch

    return pytorch


def average_of(network: nn.Module, *, plain: bool) -> Any:
    """An average, by torch or as a copy of one's own."""
    return copy.deepcopy(network) if plain else AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.9))


def classifier(pytorch: Any, *, average: bool = False, plain: bool = False) -> Any:
    class Classifier(pytorch.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.network = Net(drop=0.0)
            self.average = average_of(self.network, plain=plain) if average else None
            self.epochs = 0

        def training_step(self, data: Any, index: int) -> Tensor:
            return nn.functional.cross_entropy(self.network(data[0]), data[1])

        def validation_step(self, data: Any, index: int) -> None:
            self.log("loss", nn.functional.cross_entropy(self.network(data[0]), data[1]))

        def test_step(self, data: Any, index: int) -> None:
            self.validation_step(data, index)

        def on_train_batch_end(self, *_: Any) -> None:
            if isinstance(self.average, AveragedModel):
                self.average.update_parameters(self.network)
            elif self.average is not None:
                for own, new in zip(self.average.parameters(), self.network.parameters(), strict=True):
                    own.data.lerp_(new.detach(), 0.1)

        def on_train_epoch_end(self) -> None:
            self.epochs += 1

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.network.parameters(), lr=2e-2)

    return Classifier()


def fit(
    pytorch: Any,
    folder: Path,
    others: list[Any],
    *,
    first: bool,
    average: bool = False,
    plain: bool = False,
    **options: Any,
) -> Any:
    """Fit with the callbacks after ours, or before it; return module, callback and trainer."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    from surgery.training.lightning import LowRankCallback

    path = options.pop("ckpt_path", None)
    saving = {"save_top_k": -1, "monitor": "loss", "mode": "max", **options}  # the worst is the best: not the last
    ours = LowRankCallback(DATA[0][:8], mirrors=("average",) if plain else (), **SETTINGS)
    callbacks = [ours, *others] if first else [*others, ours]
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    every = ModelCheckpoint(folder, filename="{epoch}", **saving)
    trainer = pytorch.Trainer(max_epochs=EPOCHS, callbacks=[*callbacks, every], num_sanity_val_steps=1, **quiet)
    module = classifier(pytorch, average=average, plain=plain)
    loader = DataLoader(TensorDataset(*DATA), batch_size=8)
    trainer.fit(module, loader, DataLoader(TensorDataset(*DATA), batch_size=24), ckpt_path=path)
    return module, ours, trainer


def loss_of(pytorch: Any, state: dict[str, Tensor], **made: bool) -> float:
    module = classifier(pytorch, **made)
    module.load_state_dict(state, strict=True)
    with torch.no_grad():
        return float(nn.functional.cross_entropy(module.network.eval()(DATA[0]), DATA[1]))


def averaging(pytorch: Any, kind: str) -> list[Any]:
    from lightning.pytorch.callbacks import EMAWeightAveraging, WeightAveraging

    kinds: dict[str, Callable[[], list[Any]]] = {
        "none": list,
        "ema": lambda: [EMAWeightAveraging(decay=0.8)],
        "mean": lambda: [WeightAveraging(use_buffers=False)],
    }
    return kinds[kind]()


def scores(trainer: Any) -> dict[str, float]:
    return {path: float(score) for path, score in trainer.checkpoint_callback.best_k_models.items()}


@pytest.mark.law(3)
@pytest.mark.parametrize("options", [{}, {"save_on_train_epoch_end": False}], ids=["at-the-end", "after-validation"])
@pytest.mark.parametrize(
    ("kind", "first"), [("none", True), ("ema", True), ("ema", False), ("mean", True), ("mean", False)]
)
def test_lightning_checkpoints_hold_what_was_scored(
    lightning: Any, tmp_path: Path, kind: str, first: bool, options: dict[str, Any]
) -> None:
    module, ours, trainer = fit(lightning, tmp_path, averaging(lightning, kind), first=first, **options)
    assert [event.kind for event in ours.run.history.events] == ["decompose", "recompose"]
    assert [row.phase for row in ours.run.history] == ["dense", *["factored"] * (EPOCHS - 1)]
    found = scores(trainer)
    assert len(found) == EPOCHS
    for path, score in found.items():
        state = torch.load(path, weights_only=True)["state_dict"]
        assert loss_of(lightning, state) == pytest.approx(score, abs=1e-5)
    last = torch.load(tmp_path / f"epoch={EPOCHS - 1}.ckpt", weights_only=True)["state_dict"]
    end = module.state_dict()  # the average was copied to the module, if there is one
    assert end.keys() == last.keys()
    buffers = {f"network.{name}" for name, _ in module.network.named_buffers()} if kind == "mean" else set()
    assert all(torch.allclose(value, last[name], atol=1e-5) for name, value in end.items() if name not in buffers)


def test_lightning_tests_the_best(lightning: Any, tmp_path: Path) -> None:
    module, ours, trainer = fit(lightning, tmp_path, [], first=True)
    known = scores(trainer)
    (found,) = trainer.test(module, DataLoader(TensorDataset(*DATA), batch_size=24), ckpt_path="best", verbose=False)
    assert found["loss"] == pytest.approx(max(known.values()), abs=1e-6)
    assert found["loss"] != pytest.approx(known[str(tmp_path / f"epoch={EPOCHS - 1}.ckpt")], abs=1e-3)
    trainer.fit_loop.max_epochs = EPOCHS + 2  # a state that was only tested is no state to go on with
    trainer.fit(module, DataLoader(TensorDataset(*DATA), batch_size=8), DataLoader(TensorDataset(*DATA), batch_size=24))
    assert ours.run.history[0].epoch == EPOCHS


def test_lightning_saves_dense_weights_without_callbacks_too(lightning: Any, tmp_path: Path) -> None:
    """Of the weights only, no callback is asked."""
    _, _, trainer = fit(lightning, tmp_path, [], first=True, save_weights_only=True)
    for path, score in scores(trainer).items():
        assert loss_of(lightning, torch.load(path, weights_only=True)["state_dict"]) == pytest.approx(score, abs=1e-5)


@pytest.mark.parametrize(("kind", "first"), [("none", True), ("ema", True), ("ema", False)])
def test_lightning_resumes_with_averages(
    lightning: Any, tmp_path: Path, kind: str, first: bool, subtests: pytest.Subtests
) -> None:
    whole, _, _ = fit(lightning, tmp_path / "whole", averaging(lightning, kind), first=first)
    for stop in (0, 2):
        with subtests.test(stop=stop):
            path, folder = tmp_path / "whole" / f"epoch={stop}.ckpt", tmp_path / f"from {stop}"
            again, _, _ = fit(lightning, folder, averaging(lightning, kind), first=first, ckpt_path=path)
            assert all(torch.equal(value, again.state_dict()[name]) for name, value in whole.state_dict().items())


@pytest.mark.parametrize("plain", [False, True])
def test_lightning_takes_an_average_in_the_module_along(lightning: Any, tmp_path: Path, plain: bool) -> None:
    module, _, trainer = fit(lightning, tmp_path, [], first=True, average=True, plain=plain)
    with torch.no_grad():
        assert float(nn.functional.cross_entropy(module.average.eval()(DATA[0]), DATA[1])) < 2
    for path, score in scores(trainer).items():
        state = torch.load(path, weights_only=True)["state_dict"]
        assert loss_of(lightning, state, average=True, plain=plain) == pytest.approx(score, abs=1e-5)


def keepers(pytorch: Any) -> list[Any]:
    """Callbacks with copies that cannot be taken along."""
    from lightning.pytorch.callbacks import StochasticWeightAveraging

    class Shadows(pytorch.Callback):  # type: ignore[misc]
        def on_fit_start(self, trainer: Any, module: Any) -> None:
            self.shadows = {name: p.detach().clone() for name, p in module.named_parameters()}

    class Copies(pytorch.Callback):  # type: ignore[misc]
        def on_train_start(self, trainer: Any, module: Any) -> None:
            self.kept = copy.deepcopy(module.network)

    return [StochasticWeightAveraging(swa_lrs=1e-3, swa_epoch_start=2), Shadows(), Copies()]


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("which", range(3))
def test_lightning_callbacks_with_copies_are_refused_before_training(
    lightning: Any, tmp_path: Path, which: int, first: bool
) -> None:
    keeper, epochs = keepers(lightning)[which], []
    keeper.on_train_batch_start = lambda *_: epochs.append(1)
    with pytest.raises(InputError, match=type(keeper).__name__) as caught:
        fit(lightning, tmp_path, [keeper], first=first)
    assert "\n" not in str(caught.value)
    assert not epochs


@pytest.fixture
def transformers() -> Any:
    library = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    return library


class Words(nn.Module):
    """A model that is none of the library's."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.hidden, self.head = nn.Embedding(30, 16), nn.Linear(16, 32), nn.Linear(32, 3)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Return the logits, and the loss where there are labels."""
        logits = self.head(torch.relu(self.hidden(self.table(input_ids).mean(1))))
        return (
            {"logits": logits}
            if labels is None
            else {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}
        )


def bert(transformers: Any) -> Any:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    drops = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = transformers.BertConfig(vocab_size=30, max_position_embeddings=8, num_labels=3, **sizes, **drops)
    return transformers.BertForSequenceClassification(config)


def rows(count: int, *, wrong: int = 0) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(30, (count, 6), generator=generator)
    return [{"input_ids": row, "labels": (int(row[0]) + wrong) % 3} for row in ids]


def weights_in(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


# Half of all combinations, such that each three values meet; all where all laws are asked for.
ENDS = [
    (own, strategy, wrong, recompose_at)
    for at, (own, strategy, wrong, recompose_at) in enumerate(
        product([False, True], ["epoch", "steps"], [0, 1], ["end", None])
    )
    if ALL or at.bit_count() % 2 == 0
]


@pytest.mark.parametrize(("own", "strategy", "wrong", "recompose_at"), ENDS)
def test_huggingface_ends_with_the_best(
    transformers: Any, tmp_path: Path, own: bool, strategy: str, wrong: int, recompose_at: Any
) -> None:
    from surgery.training.huggingface import LowRankCallback

    torch.manual_seed(0)
    model = Words() if own else bert(transformers)
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        num_train_epochs=3,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        eval_strategy=strategy,
        save_strategy=strategy,
        eval_steps=2,
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        logging_strategy="no",
    )
    ours = LowRankCallback(
        {"input_ids": torch.stack([row["input_ids"] for row in rows(8)])},
        decompose_at=1,
        ranks={"*hidden" if own else "*.dense": 4},
        factorization="svd",
        recompose_at=recompose_at,
    )
    stopping = transformers.EarlyStoppingCallback(2)
    trainer = transformers.Trainer(
        model, arguments, train_dataset=rows(24), eval_dataset=rows(24, wrong=wrong), callbacks=[ours, stopping]
    )
    trainer.train()
    best, got = weights_in(Path(trainer.state.best_model_checkpoint)), model.state_dict()
    assert all(torch.equal(got[name], value) for name, value in best.items())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, abs=1e-6)
    assert ours.run.phase == "recomposed"
    kinds = [event.kind for event in ours.run.history.events]
    assert kinds == ["decompose", "recompose"]
    folders = sorted(tmp_path.glob("checkpoint-*"))
    assert len(folders) >= 2
    for folder in folders:
        assert weights_in(folder).keys() == best.keys()
    history = json.loads((folders[-1] / "trainer_state.json").read_text())["log_history"]
    scored = {f"checkpoint-{row['step']}": row["eval_loss"] for row in history if "eval_loss" in row}
    for folder in folders:
        model.load_state_dict(weights_in(folder), strict=False)
        if folder.name in scored:
            assert trainer.evaluate()["eval_loss"] == pytest.approx(scored[folder.name], abs=1e-5)
