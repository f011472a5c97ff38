"""nn.LSTM, nn.GRU and nn.RNN with their weights as modules of their own, so that each can be factored.

    LSTM    i, f, g, o = W x + R h        c <- s(f) c + s(i) tanh(g)    h <- s(o) tanh(c), then P h where there is a P
    GRU     r, z = s(W x + R h)           n = tanh(W x + r R h)         h <- n + z (h - n)
    RNN     h <- tanh(W x + R h), or with relu

Biases are left out, and s is the sigmoid. torch keeps W, R and P of layer k as weight_ih_lk, weight_hh_lk and
weight_hr_lk, which only a kernel reads; UnpackedRecurrent calls them as ih_lk, hh_lk and hr_lk. W is one product for
all steps. As long as R and P of a layer are dense, torch's kernel does the rest, with the last factor of W as its input
weight. Otherwise a loop runs over the steps; torch.export captures it as one ``scan``, and ONNX has it as one Scan.

While the kernel runs, a graph does not show the call of R. So a graph that serves to find calls has an outline instead
(``outlining``): the same modules on values of the same shapes, for all steps at once, without the loop. An outline is
never run for its numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from surgery.errors import InputError
from surgery.kinds.layers.carried import carry, is_watched
from surgery.kinds.layers.factored import Factored

__all__ = ["UnpackedGRU", "UnpackedLSTM", "UnpackedRNN", "UnpackedRecurrent", "outlining"]

_KERNELS: dict[str, Callable[..., Any]] = {
    "LSTM": torch.lstm,
    "GRU": torch.gru,
    "RNN_TANH": torch.rnn_tanh,
    "RNN_RELU": torch.rnn_relu,
}
_PARTS = ("ih", "hh", "hr")
_OUTLINE: ContextVar[bool] = ContextVar("outline", default=False)

State = tuple[Tensor, ...]


@contextmanager
def outlining() -> Iterator[None]:
    """Let unpacked recurrent modules run as their outlines, for a graph that serves to find calls."""
    token = _OUTLINE.set(True)
    try:
        yield
    finally:
        _OUTLINE.reset(token)


class _Step(nn.Module):
    """One step: it returns the states after the step, from W x (N, G H) and the states before the step."""

    def __init__(self, mode: str, hh: nn.Module, hr: nn.Module | None) -> None:
        super().__init__()
        self.mode, self.hh, self.hr = mode, hh, hr

    def forward(self, part: Tensor, state: State, bias: Tensor | None) -> State:
        h, recurrent = state[0], self.hh(state[0])
        if self.mode == "LSTM":
            i, f, g, o = (part + recurrent).chunk(4, -1)
            c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            return (h if self.hr is None else self.hr(h), c)
        if self.mode == "GRU":
            # n = tanh(W x + b_W + r (R h + b_R)): r multiplies the recurrent bias too, which
            # therefore is not part of W x
            recurrent = recurrent if bias is None else recurrent + bias
            size = h.shape[-1]
            r, z = (part[..., : 2 * size] + recurrent[..., : 2 * size]).sigmoid().chunk(2, -1)
            n = (part[..., 2 * size :] + r * recurrent[..., 2 * size :]).tanh()
            return (n + z * (h - n),)
        return ((part + recurrent).tanh() if self.mode == "RNN_TANH" else (part + recurrent).relu(),)


class UnpackedRecurrent(nn.RNNBase):
    """A recurrent module that calls ``ih_l0``, ``hh_l0``, ... (``hr_l0`` with projections), on (..., features).

    ``unpack`` makes it, as an ``UnpackedLSTM``, ``UnpackedGRU`` or ``UnpackedRNN``; these are subclasses of torch's
    classes. The parts have no bias: ``bias_ih_l0``, ``bias_hh_l0``, ... (G H,) stay parameters of the module. All other
    attributes, the training flag and the hooks are those of the original module; biases and weights are the same
    objects. ``weight_ih_l0``, ... can be read as long as they are whole. Each part may be replaced by a module that
    maps the same widths, such as low-rank factors.
    """

    outlined = True

    def __init__(self, module: nn.RNNBase) -> None:
        nn.Module.__init__(self)
        carry(self, module, own=module._flat_weights_names)
        # torch's class keeps these for its kernel, which does not run on the module itself any more
        self._flat_weights_names, self._flat_weights, self._flat_weight_refs = [], [], []
        self._all_weights = module._all_weights
        for name in module._flat_weights_names:
            parameter = module._parameters[name]
            if not name.startswith("weight_"):
                self._parameters[name] = parameter
            else:
                self.add_module(name.removeprefix("weight_"), _linear(parameter).train(module.training))

    def __getattr__(self, name: str) -> Any:
        parts = self.__dict__.get("_modules", {})
        part = parts.get(name.removeprefix("weight_")) if name.startswith("weight_") else None
        if part is None:
            return super().__getattr__(name)
        if not isinstance(part, nn.Linear):
            raise AttributeError(f"{type(self).__name__} has no {name}: it is factored")
        return part.weight

    def __getstate__(self) -> dict[str, Any]:
        return dict(self.__dict__)

    def __setstate__(self, state: dict[str, Any]) -> None:
        nn.Module.__setstate__(self, state)

    def flatten_parameters(self) -> None:
        """Do nothing: the weights are not in one block of memory, as cuDNN needs them."""

    def forward(self, input: Tensor | PackedSequence, hx: Any = None) -> tuple[Any, Any]:
        """Return the hidden states of the last layer and the last states of all layers, as torch's modules do.

        Shapes: input (T, N, I), or (N, T, I) where ``batch_first``, or (T, I), or a PackedSequence; hx (layers *
        directions, N, H), or the pair of hidden and cell states of an LSTM, without N for (T, I).

        Raises:
            InputError: the input or the states have other shapes.
        """
        if _OUTLINE.get():
            return self._outline(input, hx)
        given = input.data if isinstance(input, PackedSequence) else input
        axes = (2,) if isinstance(input, PackedSequence) else (2, 3)
        if given.dim() not in axes or given.shape[-1] != self.input_size:
            what = f"the input of {self.mode} has shape {tuple(given.shape)}"
            raise InputError(what, allowed=f"{' or '.join(map(str, axes))} axes, the last of {self.input_size}")
        if isinstance(input, PackedSequence):
            sizes: list[int] = input.batch_sizes.tolist()
            states = self._initial(hx, given, sizes[0], order=input.sorted_indices)
            return self._finished(input, *self._layers(given, states, sizes))
        single = given.dim() == 2
        x = given.unsqueeze(1) if single else given.transpose(0, 1) if self.batch_first else given
        states = self._initial(hx, x, x.shape[1], single=single)
        return self._finished(input, *self._layers(x, states, None), single=single)

    def states_like(self, x: Tensor) -> State:
        """Return states of zeros for an input (T, N, I), or (N, T, I) where ``batch_first``."""
        count, batch = self.num_layers * self._directions, x.shape[0 if self.batch_first else 1]
        return tuple(x.new_zeros(count, batch, width) for width in self._widths)

    def _initial(self, hx: Any, x: Tensor, batch: int, *, single: bool = False, order: Tensor | None = None) -> State:
        """Return the states before the first step, each (layers * directions, N, width), with rows in sorted order."""
        count = self.num_layers * self._directions
        # Of an LSTM with projections, h has P numbers and c has H.
        shapes = [(count, batch, width) for width in self._widths]
        if hx is None:
            return tuple(x.new_zeros(shape) for shape in shapes)
        given = tuple(hx) if self.mode == "LSTM" else (hx,)
        given = tuple(state.unsqueeze(1) for state in given) if single else given
        found = [tuple(state.shape) for state in given]
        if found != shapes:
            raise InputError(f"the states of {self.mode} have shapes {found}", allowed=f"{shapes} for this input")
        return given if order is None else tuple(state.index_select(1, order) for state in given)

    def _layers(self, x: Tensor, states: State, sizes: list[int] | None) -> tuple[Tensor, list[State]]:
        ends: list[State] = []
        for layer in range(self.num_layers):
            rows = []
            for suffix in self._suffixes(layer):
                # states lie in the order l0, l0_reverse, l1, ..., which is that of the loops
                state = tuple(part[len(ends)] for part in states)
                out, end = self._run(suffix, x, state, sizes)
                rows.append(out)
                ends.append(end)
            x = rows[0] if len(rows) == 1 else torch.cat(rows, -1)
            if self.dropout and self.training and layer + 1 < self.num_layers:
                x = F.dropout(x, self.dropout)
        return x, ends

    def _finished(self, given: Any, x: Tensor, ends: Sequence[State], *, single: bool = False) -> tuple[Any, Any]:
        last = tuple(torch.stack(part) for part in zip(*ends, strict=True))
        out: Tensor | PackedSequence
        if isinstance(given, PackedSequence):
            out = PackedSequence(x, given.batch_sizes, given.sorted_indices, given.unsorted_indices)
            if given.unsorted_indices is not None:
                last = tuple(part.index_select(1, given.unsorted_indices) for part in last)
        elif single:
            out, last = x.squeeze(1), tuple(part.squeeze(1) for part in last)
        else:
            out = x.transpose(0, 1) if self.batch_first else x
        return out, last if self.mode == "LSTM" else last[0]

    @property
    def _directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def _widths(self) -> tuple[int, ...]:
        """The widths of the states: of the hidden ones, and of an LSTM's cell states."""
        hidden = self.proj_size or self.hidden_size
        return (hidden, self.hidden_size) if self.mode == "LSTM" else (hidden,)

    def _suffixes(self, layer: int) -> list[str]:
        return [f"l{layer}", f"l{layer}_reverse"][: self._directions]

    def _part(self, part: str, suffix: str) -> nn.Module | None:
        return self._modules.get(f"{part}_{suffix}")

    def _run(self, suffix: str, x: Tensor, state: State, sizes: list[int] | None) -> tuple[Tensor, State]:
        """Run one layer in one direction; return the hidden states of all steps and the states after the last step."""
        backwards = suffix.endswith("_reverse")
        # the kernel runs one layer in one direction at a time, so that it can have its own first factors before it
        kernel = self._kernel_weights(suffix) if sizes is None else None
        if kernel is None:
            return self._loop(suffix, x, state, sizes, backwards=backwards)
        first, weights = kernel
        # backward in time is forward over the flipped sequence
        x = first(x.flip(0) if backwards else x)
        begin = tuple(part.unsqueeze(0).contiguous() for part in state)
        hx = begin if self.mode == "LSTM" else begin[0]
        # has_biases, num_layers, dropout, train, bidirectional, batch_first
        out, *ends = _KERNELS[self.mode](x, hx, weights, self.bias, 1, 0.0, self.training, False, False)
        return out.flip(0) if backwards else out, tuple(part.squeeze(0) for part in ends)

    def _kernel_weights(self, suffix: str) -> tuple[nn.Module, list[Tensor]] | None:
        """Return the module to run before torch's kernel and the kernel's weights; None if it cannot be used."""
        first, last = _split(self.get_submodule(f"ih_{suffix}"))
        parts = [last, self._part("hh", suffix), self._part("hr", suffix)]
        if not all(part is None or _is_plain(part) for part in parts) or last is None:
            return None
        # torch's order is W, R, then both biases, then P
        weights = [part.weight for part in parts if part is not None]
        biases = self._biases(suffix)
        return first, [*weights[:2], *biases, *weights[2:]]

    def _biases(self, suffix: str) -> list[Tensor]:
        return [getattr(self, f"bias_{part}_{suffix}") for part in _PARTS[:2]] if self.bias else []

    def _loop(
        self, suffix: str, x: Tensor, state: State, sizes: list[int] | None, *, backwards: bool
    ) -> tuple[Tensor, State]:
        """Run one layer step by step; with ``sizes``, step t is run for the first ``sizes[t]`` rows only."""
        # Rows are sorted by length, longest first: step t has the first sizes[t] rows. For sizes [3, 3, 1] a forward
        # run drops rows 1 and 2 before the last step and keeps their states as their ends; a backward run starts with
        # row 0 and takes rows 1 and 2 in, with their initial states, at the second step.
        parts = self.get_submodule(f"ih_{suffix}")(x)
        biases = self._biases(suffix)
        if self.mode == "GRU":
            parts = parts + biases[0] if biases else parts
        else:  # under autocast these kernels use the lower precision throughout; that of a GRU does not
            parts = sum(_as(biases, parts.dtype), parts)
            state = _as(state, parts.dtype)
        if sizes is None and torch.compiler.is_exporting():
            return self._scan(suffix, parts, state, backwards=backwards)
        steps = list(parts.unbind(0) if sizes is None else parts.split(sizes))
        run, recurrent_bias = self._step(suffix)
        out, ended, begin = [], [], state
        if backwards:
            steps.reverse()
            state = tuple(part[: steps[0].shape[0]] for part in state)
        for step in steps:
            rows, before = step.shape[0], state[0].shape[0]
            if rows > before:
                state = tuple(torch.cat([s, b[before:rows]]) for s, b in zip(state, begin, strict=True))
            elif rows < before:
                ended.append(tuple(part[rows:] for part in state))
                state = tuple(part[:rows] for part in state)
            state = run(step, state, recurrent_bias)
            out.append(state[0])
        if backwards:
            out.reverse()
        # rows that ended last were longest, and come first
        whole = [state, *reversed(ended)]
        ends = state if len(whole) == 1 else tuple(torch.cat(part) for part in zip(*whole, strict=True))
        return torch.stack(out) if sizes is None else torch.cat(out), ends

    def _scan(self, suffix: str, parts: Tensor, state: State, *, backwards: bool) -> tuple[Tensor, State]:
        """Run the loop as one operator; the body of the loop gets all parameters that it reads as inputs.

        The operator is called directly, without torch's wrapper. The wrapper compiles its call, and takes some sizes
        for dynamic ones because of earlier compilations.
        """
        from torch._higher_order_ops.scan import scan_op  # torch has no public name for it yet

        step, bias = self._step(suffix)
        names, parameters = zip(*step.named_parameters(), strict=True)
        count = len(state)

        def body(*given: Tensor) -> list[Tensor]:
            # a scan passes the states, then its slice of the inputs, then the further inputs
            part, *others = given[count:]
            after = torch.func.functional_call(
                step,
                dict(zip(names, others, strict=False)),
                (part, given[:count], None if bias is None else others[-1]),
            )
            return [*after, after[0].clone()]  # no value may be an output twice

        begin = [part.clone() for part in state]
        biases = () if bias is None else (bias,)
        *ends, out = scan_op(body, begin, [parts.flip(0) if backwards else parts], (*parameters, *biases))
        return out.flip(0) if backwards else out, tuple(ends)

    def _step(self, suffix: str) -> tuple[_Step, Tensor | None]:
        """Return the module for one step, and the bias that it needs."""
        step = _Step(self.mode, self.get_submodule(f"hh_{suffix}"), self._part("hr", suffix))
        return step, self._biases(suffix)[1] if self.bias and self.mode == "GRU" else None

    def outline(self, input: Tensor) -> tuple[Any, Any]:
        """Run the outline on the input, without initial states."""
        return self._outline(input, None)

    def _outline(self, x: Any, hx: Any) -> tuple[Any, Any]:
        """Call all parts on values of the right shapes, for all steps at once; return outputs of the right shapes."""
        # Each part is called once, on (..., features) for all steps. The results have the right shapes and depend on
        # all inputs, so that a tracer keeps every call.
        begin = () if hx is None else (hx[0].sum(), hx[1].sum()) if self.mode == "LSTM" else (hx.sum(),)
        ends: tuple[list[Tensor], ...] = tuple([] for _ in self._widths)
        for layer in range(self.num_layers):
            rows = []
            for suffix in self._suffixes(layer):
                # (..., I) -> (..., 1) -> (..., H), and gates (..., G H) of which H numbers serve as the cell
                before = x[..., :1].repeat_interleave(self._widths[0], -1)
                gates = self.get_submodule(f"ih_{suffix}")(x) + self.get_submodule(f"hh_{suffix}")(before)
                cell = torch.sigmoid(gates)[..., : self.hidden_size]
                project = self._part("hr", suffix)
                hidden = cell if project is None else project(cell)
                rows.append(hidden)
                for end, states in zip(ends, (hidden, cell), strict=False):
                    end.append(states.select(-2 if self.batch_first else 0, -1))
            x = rows[0] if len(rows) == 1 else torch.cat(rows, -1)
        x, *last = (sum(begin, value) for value in (x, *(torch.stack(part) for part in ends)))
        return x, tuple(last) if self.mode == "LSTM" else last[0]

    def extra_repr(self) -> str:
        """Return the mode and the sizes of the module."""
        return f"{self.mode}, {self.input_size}, {self.hidden_size}, num_layers={self.num_layers}"


class UnpackedLSTM(UnpackedRecurrent, nn.LSTM):
    """An nn.LSTM whose weights are modules of their own."""


class UnpackedGRU(UnpackedRecurrent, nn.GRU):
    """An nn.GRU whose weights are modules of their own."""


class UnpackedRNN(UnpackedRecurrent, nn.RNN):
    """An nn.RNN whose weights are modules of their own."""


def _as(tensors: Sequence[Tensor], dtype: torch.dtype) -> State:
    """Return tensors in a dtype; tensors that already have it add no operation to a graph."""
    return tuple(tensor if tensor.dtype == dtype else tensor.to(dtype) for tensor in tensors)


def _linear(weight: Any) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = weight
    return linear


def _is_plain(module: Any) -> bool:
    return type(module) is nn.Linear and module.bias is None and not is_watched(module)


def _split(module: nn.Module) -> tuple[nn.Module, Any]:
    """Split a part into the modules before its last linear layer, and that layer (None if it does not end with one)."""
    if _is_plain(module):
        return nn.Identity(), module
    watched = any(map(is_watched, module.modules()))
    if isinstance(module, Factored) and not watched and _is_plain(module.steps[-1]):
        return nn.Sequential(*module.steps[:-1]), module.steps[-1]
    return module, None
