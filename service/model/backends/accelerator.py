"""Run a graph on an accelerator: every call has one of a few sizes, and each size is run before the model is ready.

The first call of a new size is slow on a GPU: cuDNN chooses an algorithm for each convolution, TorchScript compiles,
and the allocator asks for memory. Calls are therefore padded to the next power of two and the padding is cut off.
"""

import numpy as np

from service.errors import InferenceError
from service.model.backends import Array, Backend

DEFAULT_ROWS = 64  # in one call, until `warm_up` has found how many fit
WARM_UP_CALLS = 3  # TorchScript profiles in the first call of a size and compiles in the second


class AcceleratorBackend:
    """A backend on an accelerator, with calls of 1, 2, 4, ... rows up to a largest size; larger calls are split.

    Args:
        backend: Runs the graph.
        shape: Of one row.
    """

    def __init__(self, backend: Backend, shape: tuple[int, ...]) -> None:
        self.name = backend.name
        self.device = backend.device
        self.provider = f"{backend.provider} with TF32" if backend.is_tf32 else backend.provider
        self.is_tf32 = backend.is_tf32
        self._backend = backend
        self._shape = shape
        self._most = DEFAULT_ROWS

    def run(self, inputs: Array) -> Array:
        """Return the graph's outputs, float32 (N, K). See `Backend.run`."""
        count = len(inputs)
        if count > self._most:
            parts = [self.run(inputs[start : start + self._most]) for start in range(0, count, self._most)]
            return np.concatenate(parts)
        size = choose_size(count, self._most)
        if count in (0, size):
            return self._backend.run(inputs)
        padded = np.concatenate([inputs, np.repeat(inputs[-1:], size - count, axis=0)])  # rows that the graph takes
        return self._backend.run(padded)[:count]

    def warm_up(self, max_rows: int) -> None:
        """Run zeros in every size up to `max_rows`, largest first, so that smaller sizes need no more memory.

        If a size fails, such as for too little memory, no call will have as many rows.

        Raises:
            InferenceError: The graph fails on a single row.
        """
        self._most, size = max_rows, max_rows
        while size:
            zeros = np.zeros((size, *self._shape), np.float32)
            try:
                for _ in range(WARM_UP_CALLS):
                    self._backend.run(zeros)
            except InferenceError:
                if size == 1:
                    raise
                self._most = next_smaller(size)
            size = next_smaller(size)


def choose_size(count: int, most: int) -> int:
    """Return the size of a call with `count` rows: the next power of two, or `most` if that is smaller."""
    return min(1 << max(count - 1, 0).bit_length(), most)


def next_smaller(size: int) -> int:
    """Return the largest power of two below `size`, 0 below 1."""
    return 1 << (size - 1).bit_length() - 1 if size > 1 else 0
