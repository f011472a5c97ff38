"""Sessions of onnxruntime on the CPU: opened with a stated number of threads, and bound to their inputs.

After a run, onnxruntime's workers spin for milliseconds, waiting for the next. The workers of the session that has just
run would then occupy the cores of the one that is being timed. There are two answers:

- Whole models are sessions of their own. Their workers spin within a run, as in production, but stop at its end
  (``session.force_spinning_stop``). The first nodes of a run then wait some tens of microseconds for their workers.
- Single operators are too short for that. The two of a pair are the branches of one model in one session
  (``model.build_choice``). Both use the same workers, which spin between runs (``spin=True``) and are awake when an
  operator starts, as they are inside a network.

Measured on two idle cores with two threads (a 3x3 convolution of 128 channels at 28x28; a linear layer of 512 at 16
rows), in microseconds: each alone 1040 and 44; as a branch 1020 and 42; in a session next to another one whose workers
spin up to 2010 and 41; stopped after each run 1050 and 56; never spinning 1050 and 64, and short chains twice as slow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from surgery.errors import InputError
from surgery.text import first_line

__all__ = ["bind"]


def bind(session: ort.InferenceSession, feeds: Mapping[str, npt.NDArray[np.generic]]) -> Callable[[], None]:
    """Return a callable that runs the session on these inputs without copying tensors in or out of Python.

    Raises:
        InputError: onnxruntime cannot run the model on these inputs.
    """
    binding = session.io_binding()
    try:
        for name, array in feeds.items():
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
        for output in session.get_outputs():
            binding.bind_output(output.name, "cpu")
        session.run_with_iobinding(binding)
        for output, value in zip(session.get_outputs(), binding.get_outputs(), strict=True):
            if value.is_tensor():
                binding.bind_ortvalue_output(output.name, value)
    except Exception as error:  # onnxruntime raises errors of many types
        raise InputError(f"onnxruntime cannot run the model on these inputs: {first_line(error)}") from error
    return lambda: session.run_with_iobinding(binding)
