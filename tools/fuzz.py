"""Fuzz every kind of file that surgery opens, by mutating bytes, archive entries, JSON values and pickle opcodes.

    python tools/fuzz.py --minutes 60 --seed 0
    python tools/fuzz.py --replay fuzz-failures/17-plan.json

Each case is a valid file changed in a few places, and a command line that opens it, run in its own fork with limits on
memory and processor time. A case fails if the process crashes, hangs or takes too much memory; if it prints a
traceback, an internal error or control characters; if it ends with a status other than 0, 2 or 3; if it leaves
temporary files; or if it writes a file, starts a process or opens a connection that the command line does not ask for
(an audit hook sees these). Failed files are kept in a folder with their command lines, and can be replayed.

The exit status is 0 if no case failed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import pickletools
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script finds modules in tools/ only
os.environ |= {"OMP_NUM_THREADS": "1", "SURGERY_CACHE": "off"}  # before torch is imported

import numpy as np
import onnx.parser
import safetensors.torch
import torch
from rich.console import Console
from rich.progress import Progress
from torch import nn

import surgery.cli.group  # noqa: F401  # forks start at once
from surgery.cli import main as surgery_main

MEMORY, WORK, WALL = 6 << 30, 20.0, 120.0  # bytes of address space, seconds of processor time, seconds of the clock
RESIDENT = 3000  # megabytes
ALLOWED = {0, 2, 3}
QUICK = ["-o", "out", "--force", "--no-timing"]
EVENTS = {"os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork", "socket.connect", "pty.spawn"}
NASTY: tuple[Any, ...] = (
    None, True, 0, -1, 1 << 31, 1 << 63, -(1 << 63), 10**30, 1e308, float("nan"), "", "\x1b[31m", "[/red]", "\ud800",
    "../../x", "a" * 70000, [], {}, [[[[]]]], "os.system", "Max(s0,s1)", "Symbol('s0')",
    "torch.ops.aten.as_strided.default",
)  # fmt: skip

_NUMBERS = (0, 1, -1, 2, 7, 8, 17, 255, 1 << 20, 1 << 31, (1 << 63) - 1, -(1 << 63), 1.5)
_TEXTS = (
    "",
    "x",
    "\x1b[31m",
    "../../x",
    "/etc/passwd",
    "parts.bin",
    "a" * 70000,
    "Loop",
    "If",
    "ai.onnx.ml",
    "99999999",
)

Random = random.Random
Mutate = Callable[[bytes, Random], bytes]


@dataclass(frozen=True)
class Target:
    """A file, and the command line that opens it; ``{}`` stands for the mutated file."""

    file: str
    words: tuple[str, ...]


class _Net(nn.Module):
    shift: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 4)
        self.register_buffer("shift", torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (batch, 4) of images (batch, 3, height, width)."""
        y: torch.Tensor = self.linear(torch.relu(self.conv(x)).mean((2, 3)))
        return y * x.shape[0] + self.shift


def write_seeds() -> list[Target]:
    """Write the valid files into the current folder, and return the targets."""
    torch.manual_seed(0)
    net, images = _Net().eval(), torch.randn(4, 3, 8, 8)
    batch = torch.export.Dim("batch", min=2, max=64)
    torch.export.save(torch.export.export(net, (images,), dynamic_shapes=({0: batch},)), "net.pt2")
    chain = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)).eval()
    torch.export.save(torch.export.export(chain, (torch.randn(2, 8),)), "mlp.pt2")
    torch.save(chain.state_dict(), "state.pt")
    safetensors.torch.save_file(chain.state_dict(), "state.safetensors")
    samples = np.random.default_rng(0).standard_normal((64, 8)).astype(np.float32)
    np.savez("inputs.npz", input=samples[:2])
    np.savez_compressed("samples.npz", input=samples)
    torch.save({"input": torch.from_numpy(samples)}, "samples.pt")
    Path("factory.py").write_text(
        "from torch import nn\ndef make():\n    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))\n"
    )
    for words in (
        ["decompose", "mlp.pt2", "-o", "factored.pt2", "--ranks", "2", "--no-timing", "--save-plan", "plan.json"],
        ["export", "mlp.pt2", "-o", "net.onnx"],
    ):
        found = run(words)
        if found.status != 0:
            raise SystemExit(f"surgery {' '.join(words)}: {found.said}")
    write_onnx_seeds()
    state = ("inspect", "{}", "--model", "factory:make", "--input-shape", "2,8")
    calibrated = ("decompose", "mlp.pt2", "--ranks", "2", "--calibration", "{}", *QUICK)
    return [
        *(Target("net.pt2", words) for words in (("inspect", "{}"), ("compare", "{}", "{}"))),
        Target("net.pt2", ("decompose", "{}", "--ranks", "2", *QUICK)),
        Target("mlp.pt2", ("compare", "{}", "mlp.pt2")),
        Target("factored.pt2", ("recompose", "{}", "-o", "out", "--force")),
        Target("factored.pt2", ("report", "{}", "-o", "out.html", "--force")),
        Target("plan.json", ("decompose", "mlp.pt2", "--plan", "{}", *QUICK)),
        Target("plan.json", ("plan", "diff", "{}", "plan.json")),
        *(Target(name, state) for name in ("state.pt", "state.safetensors")),
        Target("inputs.npz", ("compare", "mlp.pt2", "mlp.pt2", "--inputs", "{}")),
        *(Target(name, calibrated) for name in ("samples.npz", "samples.pt")),
        Target("net.onnx", ("compare", "mlp.pt2", "{}")),
        *(
            Target(name, words)
            for name in ("net.onnx", "parts.onnx")
            for words in (("inspect", "{}"), ("compare", "{}", "{}"))
        ),
        *(Target(name, ("decompose", "{}", "--ranks", "2", *QUICK)) for name in ("net.onnx", "parts.onnx")),
        Target("factored.onnx", ("recompose", "{}", "-o", "out", "--force")),
    ]


def write_onnx_seeds() -> None:
    """Write ONNX files: factored; and with weights in another file, bodies, functions and all kinds of tensors."""
    found = run(["decompose", "net.onnx", "-o", "factored.onnx", "--ranks", "2", "--no-timing"])
    if found.status != 0:
        raise SystemExit(f"surgery decompose net.onnx: {found.said}")
    chance = np.random.default_rng(0)
    weights = {"w": chance.standard_normal((8, 16)), "v": chance.standard_normal((16, 8)), "b": np.zeros(8)}
    text = """
        <ir_version: 8, opset_import: ["": 17, "own": 1]>
        g (float[n, 8] x) => (float[n, 8] y) {
            h = MatMul(x, w)
            r = Relu(h)
            t = Constant <value = bool {1}> ()
            p = If (t) <then_branch = a () => (float[n, 8] o) { o = MatMul(r, v) },
                else_branch = e () => (float[n, 8] o2) { o2 = own.twice(x) }>
            y = Add(p, b)
        }
        <domain: "own", opset_import: ["": 17]>
        twice (x) => (y) { y = Add(x, x) }
    """
    model = onnx.parser.parse_model(text)
    for name, array in weights.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(array.astype(np.float32), name))
    onnx.save(model, "parts.onnx", save_as_external_data=True, location="parts.bin", size_threshold=64)


# -- mutations ---------------------------------------------------------------------------------------------------------


def mutate_bytes(data: bytes, chance: Random) -> bytes:
    """Flip, cut, repeat or fill bytes in a few places."""
    raw = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 8, 64))):
        at, size = chance.randrange(len(raw) + 1), chance.choice((1, 2, 4, 8, 64, 4096))
        match chance.randrange(5):
            case 0 if at < len(raw):
                raw[at] ^= 1 << chance.randrange(8)
            case 1:
                del raw[at : at + size]
            case 2:
                raw[at:at] = raw[at : at + size] or b"\0"
            case 3:
                raw[at : at + size] = bytes([chance.choice((0, 255, 128, 127))]) * min(size, len(raw) - at)
            case _:
                raw[at : at + size] = chance.randbytes(min(size, len(raw) - at))
        if not raw:
            break
    return bytes(raw[: chance.randrange(len(raw) + 1)] if raw and chance.random() < 0.1 else raw)


def mutate_json(data: bytes, chance: Random) -> bytes:
    """Replace, remove or repeat a few values, at any depth."""
    value = json.loads(data)
    for _ in range(chance.choice((1, 1, 1, 2, 5))):
        places = list(_places(value))
        if not places:
            break
        holder, key = chance.choice(places)
        match chance.randrange(6):
            case 0:
                del holder[key]
            case 1 if isinstance(holder, list):
                holder.insert(key, holder[chance.randrange(len(holder))])
            case 2:
                other, there = chance.choice(places)
                with contextlib.suppress(LookupError):  # the place may be removed by now
                    holder[key] = json.loads(json.dumps(other[there]))
            case 3 if isinstance(holder[key], int):
                holder[key] = holder[key] * chance.choice((-1, 2, 1 << 20)) + chance.choice((-1, 0, 1))
            case _:
                holder[key] = chance.choice(NASTY)
    return json.dumps(value).encode("utf-8", "surrogatepass")


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield each dict or list in a value, with each key or index in it."""
    waiting = [value]
    while waiting:
        holder = waiting.pop()
        keys = list(holder) if isinstance(holder, dict) else range(len(holder)) if isinstance(holder, list) else ()
        for key in keys:
            yield holder, key
            waiting.append(holder[key])


def mutate_pickle(data: bytes, chance: Random) -> bytes:
    """Remove, repeat or exchange opcodes, or change their arguments."""
    try:
        starts = [position for _, _, position in pickletools.genops(data) if position is not None]
    except ValueError:
        return mutate_bytes(data, chance)
    codes = [data[start:stop] for start, stop in zip(starts, [*starts[1:], len(data)], strict=True)]
    for _ in range(chance.choice((1, 1, 2, 5))):
        at = chance.randrange(len(codes))
        match chance.randrange(4):
            case 0:
                codes[at] = b""
            case 1:
                codes[at] += codes[chance.randrange(len(codes))]
            case 2:
                codes[at] = codes[chance.randrange(len(codes))]
            case _ if len(codes[at]) > 1:
                codes[at] = codes[at][:1] + mutate_bytes(codes[at][1:], chance)
    return b"".join(codes)


def mutate_zip(data: bytes, chance: Random) -> bytes:
    """Mutate the content of one entry by its kind, or change the names, the order or the number of entries."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = [(name, archive.read(name)) for name in archive.namelist()]
    at = chance.randrange(len(entries))
    name, held = entries[at]
    match chance.randrange(8):
        case 0:
            del entries[at]
        case 1:
            entries.append((name, entries[chance.randrange(len(entries))][1]))
        case 2:
            entries[at] = chance.choice((name + "/../x", "/etc/x", "..\\x", name.upper(), "a" * 60000, "\ud7ff")), held
        case 3:
            other = chance.randrange(len(entries))
            entries[at], entries[other] = (name, entries[other][1]), (entries[other][0], held)
        case _:
            entries[at] = name, mutation_of(name, held)(held, chance) if held else chance.randbytes(64)
    stream = io.BytesIO()
    method = chance.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(stream, "w", method) as archive:
        for entry, content in entries:
            archive.writestr(zipfile.ZipInfo(entry), content, method)
    return stream.getvalue()


def mutate_onnx(data: bytes, chance: Random) -> bytes:
    """Replace, remove or repeat a few fields of the message, at any depth."""
    model = onnx.ModelProto.FromString(data)
    for _ in range(chance.choice((1, 1, 1, 2, 5))):
        messages = [model]
        for message in messages:
            for field, value in message.ListFields():
                if field.message_type is not None:
                    messages.extend(value if field.is_repeated else [value])
        message = chance.choice(messages)
        with contextlib.suppress(TypeError, ValueError, AttributeError):  # a value that the field cannot have
            _mutate_field(message, chance.choice(message.DESCRIPTOR.fields), messages, chance)
    return model.SerializeToString()


def _mutate_field(message: Any, field: Any, messages: list[Any], chance: Random) -> None:
    same = [other for other in messages if other.DESCRIPTOR is field.message_type]
    old = getattr(message, field.name)
    if chance.random() < 0.2:
        message.ClearField(field.name)
    elif field.message_type is not None and same:
        new = type(same[0]).FromString(chance.choice(same).SerializeToString())  # it may hold the old one
        (old.add() if field.is_repeated else old).CopyFrom(new)
    elif field.is_repeated and len(old) and chance.random() < 0.3:
        del old[chance.randrange(len(old))]
    else:
        texts = [*(other.name for other in messages if getattr(other, "name", "")), *_TEXTS]
        values: list[Any] = [chance.choice(_NUMBERS), chance.choice(texts), chance.randbytes(chance.choice((1, 8, 64)))]
        for value in values:
            with contextlib.suppress(TypeError, ValueError):
                if not field.is_repeated:
                    setattr(message, field.name, value)
                elif len(old) and chance.random() < 0.7:
                    old[chance.randrange(len(old))] = value
                else:
                    old.append(value)


def mutation_of(name: str, data: bytes) -> Mutate:
    """Return the mutation that knows the format of a file, by its name and content."""
    if data[:2] == b"PK":
        return mutate_zip
    if name.endswith((".json", ".onnx")):
        return mutate_json if name.endswith(".json") else mutate_onnx
    return mutate_pickle if name.endswith(".pkl") else mutate_bytes


def mutated(name: str, data: bytes, chance: Random) -> bytes:
    """Return mutated content for a file."""
    mutate = mutation_of(name, data) if chance.random() < 0.8 else mutate_bytes
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile warns of duplicate names
        return mutate(data, chance)


# -- running and judging -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """The outcome of a command line: its status, or why there is none; what it printed, did and used."""

    status: int | None
    ended: str
    out: str
    err: str
    done: tuple[str, ...]
    megabytes: int

    @property
    def said(self) -> str:
        """The printed text, in one line."""
        return " | ".join((self.err or self.out).split("\n")).strip()

    def faults(self, *, left: list[str]) -> list[str]:
        """Return what is wrong with an outcome, in words; ``left`` are the temporary files that the run left."""
        if self.ended:
            return [self.ended]
        text = self.out + self.err
        checks = {
            f"status {self.status}": self.status not in ALLOWED,
            "internal error": "internal error" in text,
            "traceback": "Traceback" in text,
            "control characters": any(not (c.isprintable() or c in "\n\t") for c in text),
            "more than one line of error": self.status == 2
            and not self.err.startswith("Usage")
            and len([line for line in self.err.splitlines() if line.strip()]) != 1,
            f"{self.megabytes} MB": self.megabytes > RESIDENT,
            f"left {', '.join(left)}": bool(left),
        }
        return [what for what, bad in checks.items() if bad] + list(self.done)


def run(words: list[str]) -> Outcome:
    """Run a command line of surgery in a fork, watched by an audit hook and under limits."""
    reader, writer = os.pipe()
    with tempfile.TemporaryFile() as log:
        child = os.fork()
        if child == 0:
            os.close(reader)
            _work(words, writer, log.fileno())
        os.close(writer)
        data, ended = _read(reader, child)
        _, status, usage = os.wait4(child, 0)
        log.seek(0)
        printed = log.read().decode(errors="replace")
    if not ended and (os.WIFSIGNALED(status) or not data):
        ended = f"crashed, signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else "ended without a word"
    found = {"status": None, "out": "", "err": "", "done": []} | (json.loads(data) if data and not ended else {})
    err = found["err"] + (f"\n{printed}" if printed.strip() else "")  # of C and C++, past Python's streams
    return Outcome(found["status"], ended, found["out"], err, tuple(found["done"]), usage.ru_maxrss >> 10)


def _work(words: list[str], writer: int, log: int) -> None:
    """Run in the child process: run the command line, write its outcome, and exit."""
    for stream in (1, 2):
        os.dup2(log, stream)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    out, err, done = io.StringIO(), io.StringIO(), set[str]()
    sys.argv = ["surgery", *words]
    sys.addaudithook(_watch(done))
    sys.stdout, sys.stderr = out, err
    status = 0
    try:
        surgery_main()
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc(file=err)
        status = 1
    with contextlib.suppress(BaseException), os.fdopen(writer, "w") as file:
        json.dump({"status": status, "out": out.getvalue(), "err": err.getvalue(), "done": sorted(done)}, file)
    os._exit(0)


def _watch(done: set[str]) -> Callable[[str, tuple[Any, ...]], None]:
    """Return an audit hook that records events that no command with one output file may cause."""
    here = os.getcwd()

    def see(event: str, arguments: tuple[Any, ...]) -> None:
        if event in EVENTS:
            done.add(f"{event} was called")
        elif event == "open" and isinstance(arguments[0], str | bytes):
            path = os.path.abspath(os.fsdecode(arguments[0]))
            flags = arguments[2] if isinstance(arguments[2], int) else 0
            writes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
            inside = path.startswith((here, "/dev/", "/proc/"))
            if (writes and not inside) or path.startswith(("/etc/passwd", "/etc/shadow", os.path.expanduser("~/.ssh"))):
                done.add(f"{path} was opened")

    return see


def _read(reader: int, child: int) -> tuple[bytes, str]:
    """Return what the child wrote, and why it was stopped, if it was."""
    start, data = time.monotonic(), b""
    with os.fdopen(reader, "rb", buffering=0) as pipe:
        while True:
            if select.select([pipe], [], [], 0.2)[0]:
                chunk = pipe.read(1 << 16)
                if not chunk:
                    return data, ""
                data += chunk
            elif _processor_seconds(child) > WORK or time.monotonic() - start > WALL:
                os.kill(child, signal.SIGKILL)
                return b"", f"timed out, {_processor_seconds(child):.0f} s of work"


def _processor_seconds(process: int) -> float:
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def litter() -> list[str]:
    """Return the temporary files in the folders of a run, after removing them."""
    paths = [*Path().iterdir(), *Path("tmp").iterdir()]
    left = [path for path in paths if path.name.endswith(".tmp") or path.name.startswith("surgery-")]
    for path in left:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return [path.name for path in left]


# -- the loop ----------------------------------------------------------------------------------------------------------


def one(target: Target, data: bytes) -> tuple[Outcome, list[str]]:
    """Run a target on a mutated file; return the outcome, and what is wrong with it."""
    name = f"x{Path(target.file).suffix}"
    Path(name).write_bytes(data)
    outcome = run([name if word == "{}" else word for word in target.words])
    return outcome, outcome.faults(left=litter())


def keep(folder: Path, number: int, target: Target, data: bytes, faults: list[str]) -> Path:
    """Save a failure: the file, and its command line in a second file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{number}-{target.file}"
    path.write_bytes(data)
    path.with_name(path.name + ".case").write_text(json.dumps({"words": target.words, "faults": faults}) + "\n")
    return path


def fuzz(minutes: float, seed: int, only: str, folder: Path, console: Console) -> int:
    """Fuzz for some minutes, print the failures and a table of all targets, and return the number of failures."""
    targets, chance = [target for target in write_seeds() if only in target.file], Random(seed)
    valid = {target.file: Path(target.file).read_bytes() for target in targets}
    for target in targets:
        outcome, faults = one(target, valid[target.file])
        if faults or outcome.status == 2:
            raise SystemExit(f"the valid {target.file}, {' '.join(target.words)}: {faults} {outcome.said}")
    counts: Counter[tuple[str, str]] = Counter()
    until, number, bad = time.monotonic() + 60 * minutes, 0, 0
    with Progress(console=console) as progress:
        bar = progress.add_task("fuzz", total=60 * minutes)
        while (left := until - time.monotonic()) > 0:
            target = chance.choice(targets)
            data = mutated(target.file, valid[target.file], chance)
            outcome, faults = one(target, data)
            number, bad = number + 1, bad + bool(faults)
            counts[target.file, "bad" if faults else "taken" if outcome.status == 0 else "refused"] += 1
            if faults:
                path = keep(folder, number, target, data, faults)
                console.print(f"{path}: {', '.join(faults)}: {outcome.said[:200]!r}", markup=False, highlight=False)
            progress.update(bar, completed=60 * minutes - left)
    for file in valid:
        row = ", ".join(f"{counts[file, what]} {what}" for what in ("taken", "refused", "bad"))
        console.print(f"{file:18} {row}", highlight=False)
    console.print(f"seed {seed}: {bad} of {number} handled badly", highlight=False)
    return bad


def replay(file: Path, console: Console) -> int:
    """Run a kept failure again; return 1 if it still is one."""
    case, data = json.loads(file.with_name(file.name + ".case").read_text()), file.read_bytes()
    write_seeds()
    outcome, faults = one(Target(file.name, tuple(case["words"])), data)
    console.print(f"{', '.join(faults) or 'no failure'}: status {outcome.status}, {outcome.said}", markup=False)
    return int(bool(faults))


def main() -> None:
    """Fuzz or replay in a folder of its own, and exit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="a part of the names of files to mutate, such as .onnx")
    parser.add_argument("--keep", type=Path, default=Path("fuzz-failures"), help="folder for failed files")
    parser.add_argument("--replay", type=Path, help="a file of that folder, to run again")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable()
    torch.set_num_threads(1)
    console, folder = Console(), options.keep.resolve()
    file = None if options.replay is None else options.replay.resolve()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        os.chdir(name)
        os.mkdir("tmp")
        tempfile.tempdir = os.environ["TMPDIR"] = str(Path("tmp").resolve())
        sys.path.insert(0, name)
        bad = (
            fuzz(options.minutes, options.seed, options.only, folder, console)
            if file is None
            else replay(file, console)
        )
        os.chdir("/")
    sys.exit(min(bad, 1))


if __name__ == "__main__":
    main()
