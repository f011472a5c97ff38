"""Files of calibration inputs: arrays by name, token ids as JSON lines, and what is said of those that do not fit."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn
from torch.export import Dim, export

import surgery
from surgery.cli import cli
from surgery.data import tokens
from surgery.data.collect import collect
from surgery.data.files import read_file
from surgery.data.samples import Calibration, read_calibration
from surgery.errors import FileError, InputError
from surgery.kinds.inputs import forward_signature
from tests.test_masks import IDS, LENGTHS, LONGEST, Encoder, as_kind, batch, encoder

KINDS = ["module", "graph", "program", "program-dynamic"]


def sequences() -> list[list[int]]:
    return [ids[:length].tolist() for ids, length in zip(batch()["input_ids"], LENGTHS, strict=True)]


def write(path: Path, *lines: object) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def inputs_of(samples: Calibration) -> dict[str, Tensor]:
    """All samples by name, of a model that takes ids and a mask in this order."""
    leaves = dict(zip(("input_ids", "attention_mask"), samples.leaves, strict=True))
    args, kwargs = next(iter(samples))
    return leaves if args else dict(zip(kwargs, samples.leaves, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["lists", "objects", "masks", "both"])
def test_lines_of_ids_are_padded_and_get_their_mask(form: str, kind: str, tmp_path: Path) -> None:
    model = as_kind(encoder(), kind, batch())
    lines: list[Any] = sequences()
    if form == "objects":
        lines = [{"input_ids": ids, "label": 1} for ids in lines]
    elif form == "masks":
        lines = [{"attention_mask": [True] * len(ids), "input_ids": ids} for ids in lines]
    elif form == "both":
        lines = [ids if at % 2 else {"input_ids": ids} for at, ids in enumerate(lines)]
    path = write(tmp_path / "ids.jsonl", *lines[:3], "", "  ", *lines[3:], "")
    samples = read_calibration(path, model, batch())
    found, wanted = inputs_of(samples), batch()
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        assert torch.equal(found[name], value)
    assert collect(model, samples)["q"].count == sum(LENGTHS)
    assert read_calibration(str(path), model, batch(), limit=6).count == 6


def test_no_more_lines_are_read_than_there_are_samples_wanted(tmp_path: Path) -> None:
    path = write(tmp_path / "ids.jsonl", *sequences(), "no JSON")
    assert read_calibration(path, encoder(), limit=4).count == 4


@pytest.mark.parametrize("width", [2, 4, 9])
def test_a_length_that_the_program_takes_is_kept(width: int, tmp_path: Path) -> None:
    class Ids(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.head = nn.Embedding(IDS, 4), nn.Linear(4, 4)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.head(self.tokens(input_ids)) * attention_mask.unsqueeze(-1)

    example = (torch.ones(2, width, dtype=torch.int32), torch.ones(2, width, dtype=torch.bool))
    program = export(Ids(), example, dynamic_shapes=({0: Dim("batch")}, {0: Dim("batch")}))
    samples = read_calibration(write(tmp_path / "ids.jsonl", *sequences()), program)
    ids, mask = samples.leaves
    assert (ids.dtype, mask.dtype) == (torch.int32, torch.bool)
    assert mask.sum(1).tolist() == [min(length, width) for length in LENGTHS]
    assert ids.shape == mask.shape == (len(LENGTHS), width)
    assert not ids[~mask].any()
    collect(program, samples)


def test_what_is_longer_than_a_program_takes_is_cut(tmp_path: Path, program: Any) -> None:
    samples = read_calibration(write(tmp_path / "ids.jsonl", [1] * (LONGEST + 3), [2]), program)
    assert inputs_of(samples)["attention_mask"].sum(1).tolist() == [LONGEST, 1]
    collect(program, samples)


class Bert(nn.Module):
    """A model that must have more inputs than ids."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.kinds = Encoder(), nn.Embedding(2, 3)

    def forward(
        self, input_ids: Tensor, token_type_ids: Tensor, position_ids: Tensor, attention_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        kinds = self.kinds(token_type_ids).sum() + position_ids.sum()
        return self.inner(input_ids, attention_mask)[0], kinds


def test_inputs_that_a_model_must_have_are_made(tmp_path: Path) -> None:
    zeros = torch.zeros_like(batch()["input_ids"])
    example = {**batch(), "token_type_ids": zeros, "position_ids": zeros.clone()}
    for model in (Bert(), export(Bert(), (), example)):
        path = write(tmp_path / "ids.jsonl", *sequences())
        _, kwargs = next(iter(read_calibration(path, model, example)))
        assert torch.equal(kwargs["token_type_ids"], zeros)
        assert torch.equal(kwargs["position_ids"], torch.arange(LONGEST).expand(len(LENGTHS), -1))
        assert torch.equal(kwargs["attention_mask"], batch()["attention_mask"])
    with pytest.raises(FileError, match="has no token_type_ids, which the model needs; add"):
        read_calibration(path, Bert())  # nothing is known of its shape


def test_a_decoder_has_ids_and_a_mask_of_its_own(tmp_path: Path) -> None:
    class Both(nn.Module):
        def forward(
            self,
            input_ids: Tensor,
            attention_mask: Tensor,
            decoder_input_ids: Tensor,
            decoder_attention_mask: Tensor | None = None,
            encoder_attention_mask: Tensor | None = None,
        ) -> Tensor:
            return input_ids

    lines = [{"input_ids": [1, 2, 3], "decoder_input_ids": [4]}, {"input_ids": [5], "decoder_input_ids": [6, 7]}]
    ((_, found),) = read_calibration(write(tmp_path / "ids.jsonl", *lines), Both())
    assert found["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert found["decoder_input_ids"].tolist() == [[4, 0], [6, 7]]
    assert found["decoder_attention_mask"].tolist() == [[1, 0], [1, 1]]
    assert "encoder_attention_mask" not in found
    with pytest.raises(FileError, match="line 2: has no decoder_input_ids"):
        read_calibration(write(tmp_path / "ids.jsonl", lines[0], [1]), Both())


def test_padding_for_torch_is_marked_with_ones(tmp_path: Path) -> None:
    class Padded(nn.Module):
        def forward(self, ids: Tensor, src_key_padding_mask: Tensor) -> Tensor:
            return ids

    samples = read_calibration(write(tmp_path / "ids.jsonl", [1, 2], [3]), Padded())
    assert samples.leaves[1].tolist() == [[0, 0], [0, 1]]
    assert samples.visible(next(iter(samples)))[0].tolist() == [[True, True], [True, False]]


# --- what does not fit -----------------------------------------------------------------------------------------------

OK = [1, 2, 3]
BAD_LINES: dict[str, tuple[list[Any], str]] = {
    "no JSON": (["[1, 2,"], r"ids.jsonl, line 1: is not JSON: .*; allowed: a list of token ids"),
    "later": ([OK, "", "{"], "line 3: is not JSON"),
    "deep": (["[" * 100_000], "line 1: is not JSON"),
    "a number": ([OK, 3], "line 2: is 3; allowed: a list of token ids"),
    "a text": (['"to be"'], 'line 1: is the text "to be"'),
    "a float": ([[1, 2.5]], r"line 1: input_ids holds 2.5; allowed: a list of whole numbers, 0 or more"),
    "a whole float": ([[1, 2.0]], "input_ids holds 2.0"),
    "not a number": (["[NaN]"], "input_ids holds NaN"),
    "true": ([[True]], "input_ids holds true"),
    "null": ([[None]], "input_ids holds null"),
    "a word": ([["the"]], 'input_ids holds the text "the"'),
    "nested": ([[[1, 2]]], "input_ids holds a list in a list"),
    "flat": ([{"input_ids": 3}], "input_ids is 3; allowed: a list"),
    "negative": ([OK, [1, -2]], "line 2: input_ids holds -2"),
    "huge": ([[2**70]], "input_ids holds 1180591620717411303424"),
    "beyond the embedding": ([[IDS - 1], [IDS]], f"line 2: input_ids holds {IDS}; allowed: 0 to {IDS - 1}"),
    "no ids": ([OK, []], "line 2: input_ids is empty"),
    "no name": ([{"attention_mask": [1]}], "line 1: has no input_ids"),
    "another name": ([{"input_ids": OK, "atention_mask": OK}], "no input atention_mask; allowed: input_ids, attention"),
    "a strange name": ([{"input_ids": OK, "\x1b[2J": OK}], r"no input \\x1b\[2J"),
    "lengths": ([{"input_ids": OK, "attention_mask": [1]}], "attention_mask has 1 values, input_ids has 3"),
    "nothing": ([], "holds no sample; allowed: a list of token ids"),
    "blank": (["", "  "], "holds no sample"),
}


@pytest.fixture(scope="module")
def program() -> Any:
    return as_kind(encoder(), "program-dynamic", batch())


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_line_that_does_not_fit_is_one_error(case: str, tmp_path: Path, program: Any) -> None:
    lines, message = BAD_LINES[case]
    path = write(tmp_path / "ids.jsonl", *lines)
    with pytest.raises(FileError, match=message) as caught:
        read_calibration(path, program)
    assert str(path) in str(caught.value)
    assert str(caught.value).isprintable()


def test_a_file_that_is_no_text_is_one_error(tmp_path: Path) -> None:
    path = tmp_path / "ids.jsonl"
    path.write_bytes(b"\xff\xfe[1]")
    (tmp_path / "folder.jsonl").mkdir()
    os.mkfifo(tmp_path / "pipe.jsonl")
    said = {"ids": "cannot be read", "missing": "does not exist", "folder": "is a folder", "pipe": "a pipe"}
    for name, words in said.items():
        with pytest.raises(FileError, match=words):
            read_calibration(tmp_path / f"{name}.jsonl", encoder())
    path.write_bytes(b"\xef\xbb\xbf[1]\r\n[2]\r\n")  # as some editors save it
    assert read_calibration(path, encoder()).count == 2


def test_without_a_mask_sequences_have_one_length(tmp_path: Path) -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = nn.Embedding(IDS, 4)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.tokens(tokens)

    path = write(tmp_path / "ids.jsonl", [1, 2, 3], [4])
    with pytest.raises(FileError, match=r"tokens has 1 to 3 tokens a line, and the model has no mask; allowed"):
        read_calibration(path, Plain())
    program = export(Plain(), (torch.ones(2, 2, dtype=torch.long),), dynamic_shapes=({0: Dim("batch")},))
    with pytest.raises(FileError, match=r"and the model has no mask, and takes 2"):
        read_calibration(path, program)
    samples = read_calibration(write(path, [1, 2, 3], [4, 5]), program)
    assert samples.leaves[0].tolist() == [[1, 2], [4, 5]]
    with pytest.raises(FileError, match="token ids, but input is float32 with 2 axes; give an"):
        read_calibration(path, as_kind(nn.Linear(3, 3), "program", {"input": torch.ones(2, 3)}))


def test_a_model_that_takes_any_name_is_given_its_mask(tmp_path: Path) -> None:
    class Open(nn.Module):
        def forward(self, **inputs: Tensor) -> Tensor:
            return inputs["input_ids"]

    path = tmp_path / "ids.jsonl"
    with pytest.raises(FileError, match='add "attention_mask" to each line'):
        read_calibration(write(path, [1, 2], [3]), Open())
    lines = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in ([1, 2], [3])]
    samples = read_calibration(write(path, *lines), Open())
    assert samples.visible(next(iter(samples)))[0].tolist() == [[True, True], [True, False]]


# --- arrays ----------------------------------------------------------------------------------------------------------


def test_arrays_are_cast_to_what_the_model_takes(tmp_path: Path, program: Any) -> None:
    path = tmp_path / "data.npz"
    for ids, mask in (("int32", "bool"), ("uint16", "float32"), (">i8", "int8"), ("int64", "int64")):
        arrays = {name: value.numpy() for name, value in batch().items()}
        np.savez(path, input_ids=arrays["input_ids"].astype(ids), attention_mask=arrays["attention_mask"].astype(mask))
        found = inputs_of(read_calibration(path, program))
        for name, value in batch().items():
            assert found[name].dtype == torch.int64
            assert torch.equal(found[name], value)


def test_floats_are_cast_to_floats(tmp_path: Path) -> None:
    path, model = tmp_path / "data.npz", as_kind(nn.Linear(3, 3), "program", {"input": torch.ones(2, 3)})
    np.savez(path, anything=np.ones((2, 3)))
    assert read_calibration(path, model).leaves[0].dtype == torch.float32
    np.savez(path, input=np.full((2, 3), 7))
    with pytest.raises(FileError, match="input holds int64; allowed: float32"):
        read_calibration(path, model)


ONES = np.ones((6, LONGEST), dtype=np.int64)
BAD_ARRAYS: dict[str, tuple[dict[str, Any], str]] = {
    "another name": (
        {"input_ids": ONES, "attention_mask": ONES, "mask": ONES},
        "no input mask; allowed: input_ids, att",
    ),
    "no mask": ({"input_ids": ONES}, "have no attention_mask"),
    "axes": (
        {"input_ids": ONES[0], "attention_mask": ONES},
        r"input_ids has the shape \(7,\); allowed: \(samples, any\)",
    ),
    "floats": ({"input_ids": ONES * 1.0 + 1, "attention_mask": ONES}, "input_ids holds float64; allowed: int64"),
    "samples": ({"input_ids": ONES, "attention_mask": ONES[:4]}, "input_ids has 6 samples, attention_mask has 4"),
    "lengths": ({"input_ids": ONES, "attention_mask": ONES[:, :4]}, r"shapes differ: input_ids \(6, 7\), attention_m"),
    "ids": ({"input_ids": ONES * IDS, "attention_mask": ONES}, f"input_ids holds {IDS}; allowed: 0 to {IDS - 1}"),
    "negative": ({"input_ids": -ONES, "attention_mask": ONES}, "input_ids holds -1; allowed"),
    "texts": ({"input_ids": np.array(["a"]), "attention_mask": ONES}, "input_ids holds <U1, not numbers"),
    "objects": ({"input_ids": np.array([{}]), "attention_mask": ONES}, "input_ids holds object, not numbers"),
    "nothing": ({"input_ids": ONES[:0], "attention_mask": ONES[:0]}, "input_ids has no samples"),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_arrays_that_do_not_fit_are_one_error(case: str, tmp_path: Path, program: Any) -> None:
    arrays, message = BAD_ARRAYS[case]
    np.savez(tmp_path / "data.npz", **arrays)
    with pytest.raises(InputError, match=message):
        read_calibration(tmp_path / "data.npz", program)


def test_a_damaged_archive_is_one_error(tmp_path: Path, program: Any) -> None:
    path = tmp_path / "data.npz"
    np.savez(path, **{name: value.numpy() for name, value in batch().items()})  # type: ignore[arg-type]
    whole = path.read_bytes()
    for damaged in (
        b"",
        b"PK\x03\x04",
        whole[:100],
        whole[:-30],
        whole[:150] + b"\0" * 200 + whole[350:],
    ):
        path.write_bytes(damaged)
        with pytest.raises(FileError, match=r"data.npz: (\w+: )?cannot be read: .*; allowed: .npz"):
            read_calibration(path, program)


def linear() -> Any:
    return export(nn.Linear(3, 3), (torch.ones(2, 3),), dynamic_shapes=({0: Dim("batch")},))


@pytest.mark.parametrize("order", ["C", "F"])
def test_no_more_samples_are_read_than_will_be_used(order: Any, tmp_path: Path) -> None:
    path, x = tmp_path / "data.npz", np.asarray(np.arange(3000, dtype=np.float32).reshape(1000, 3), order=order)
    np.savez(path, input=x, labels=np.zeros(10**6))  # the labels alone would be too much
    for limit, most, count in ((600, 1 << 20, 600), (2000, 1 << 20, 1000), (600, 12_000, 600), (2000, 12_000, 1000)):
        found = read_file(path, forward_signature(nn.Linear(3, 3), ((), {})), {}, limit=limit, most=most)
        assert torch.equal(found["input"], torch.from_numpy(np.ascontiguousarray(x[:count])))
    few = read_file(
        path, forward_signature(nn.Linear(3, 3), ((), {})), {}, limit=600, most=1200 if order == "C" else 12_000
    )
    assert len(few["input"]) == (100 if order == "C" else 600)


def test_an_input_that_is_no_sample_is_not_cut_and_not_mistaken_for_one(tmp_path: Path) -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x.sum() + y.sum()

    path, signature = tmp_path / "data.npz", forward_signature(Two(), ((), {}))
    for length, read in ((700, 512), (512, 511), (3, 512)):
        np.savez(path, y=np.ones(length), x=np.ones((800, 2)))
        found = read_file(path, signature, {}, limit=512)
        assert (len(found["x"]), len(found["y"])) == (read, length)


def test_what_does_not_fit_is_told_by_its_header(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    with zipfile.ZipFile(path, "w") as archive, archive.open("input.npy", "w") as entry:
        shape = {"descr": "<f4", "fortran_order": False, "shape": (1 << 20, 5)}
        np.lib.format.write_array_header_1_0(entry, shape)
        entry.write(bytes(20 << 20))
    whole = path.read_bytes()
    path.write_bytes(whole[:5000] + bytes([1]) + whole[5001:])  # numbers that are damaged, which is not come to
    with pytest.raises(FileError, match=r"input has the shape \(1048576, 5\); allowed: \(samples, 3\)"):
        read_calibration(path, linear())


TENSORS: dict[str, tuple[Any, str]] = {
    "repeated": (
        torch.ones(1, 1).expand(20_000, 20_000),
        "expands a tensor to 1600000000 bytes by repeating its numbers",
    ),
    "sparse": (torch.eye(3).to_sparse(), "holds a tensor that is not plain"),
    "without numbers": (torch.ones(3, 3, device="meta"), "holds a tensor that is not plain"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_only_plain_tensors_are_taken(case: str, tmp_path: Path) -> None:
    value, message = TENSORS[case]
    for held in ({"input": value}, [(value,)]):
        torch.save(held, tmp_path / "data.pt")
        with pytest.raises(FileError, match=message):
            read_calibration(tmp_path / "data.pt", linear())


def test_a_packed_checkpoint_is_not_unpacked(tmp_path: Path) -> None:
    plain, packed = tmp_path / "plain.pt", tmp_path / "packed.pt"
    torch.save({"input": torch.zeros(100, 3)}, plain)
    with zipfile.ZipFile(plain) as one, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as other:
        for name in one.namelist():
            other.writestr(name, one.read(name))
    assert read_calibration(plain, linear()).count == 100
    with pytest.raises(FileError, match="its entries are compressed"):
        read_calibration(packed, linear())


def test_a_list_that_holds_itself_is_one_error(tmp_path: Path) -> None:
    endless: list[Any] = [torch.ones(2, 3)]
    endless.append(endless)
    torch.save(endless, tmp_path / "data.pt")
    with pytest.raises(FileError, match="cannot be read"):
        read_calibration(tmp_path / "data.pt", linear())


@pytest.mark.parametrize("bound", ["_MOST_TEXT", "_MOST_NUMBERS"])
def test_lines_are_bounded_before_they_are_numbers(bound: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "ids.jsonl", *[[1] * 3] * 4, [1] * 50)
    assert read_calibration(path, encoder()).count == 5
    monkeypatch.setattr(tokens, bound, 100)
    with pytest.raises(FileError, match=r"passes 100 chara|5 samples of 50 numbers; allowed: 100"):
        read_calibration(path, encoder())


# --- the command line ------------------------------------------------------------------------------------------------


def run(*words: object) -> Any:
    return CliRunner().invoke(cli, [str(word) for word in words], standalone_mode=False)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # of torch's exporter to itself
def test_the_command_line_takes_ids(tmp_path: Path, program: Any) -> None:
    model, out = tmp_path / "model.pt2", tmp_path / "out.pt2"
    surgery.save(program, model)
    lines = write(tmp_path / "ids.jsonl", *sequences() * 4)
    np.savez(tmp_path / "data.npz", **{name: value.repeat(4, 1).numpy() for name, value in batch().items()})  # type: ignore[arg-type]
    words = ("decompose", model, "-o", out, "--force", "--ranks", 4, "--include", "[qk]", "--no-timing", "--json")
    printed = []
    for path in (lines, tmp_path / "data.npz"):
        done = run(*words, "--calibration", path)
        assert done.exception is None
        printed.append(json.loads(done.output)["changes"])
    assert printed[0] == printed[1] != []
    result = surgery.decompose(program, ranks=4, include=["[qk]"], calibration=str(lines))
    assert [change.error for change in result.changes] == [change["error"] for change in printed[0]]
    write(lines, [1, 2], [3, 1.5])
    for path, said in ((lines, "line 2: input_ids holds 1.5"), (tmp_path / "none.npz", "none.npz: does not exist")):
        failed = run(*words, "--calibration", path).exception
        assert isinstance(failed, FileError)
        assert failed.exit_status == 2
        assert said in str(failed)
