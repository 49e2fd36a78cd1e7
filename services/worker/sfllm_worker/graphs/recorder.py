"""Records what a function launches on a GPU, to launch it again as one CUDA graph."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor


class Recording(Protocol):
    """Launches that can be repeated on the same addresses."""

    def replay(self) -> Tensor:
        """Launch them again. The result is valid until any recording of the same recorder is replayed."""
        ...


class Recorder(Protocol):
    """Makes recordings, which share memory for their intermediate results."""

    def capture(self, function: Callable[[], Tensor]) -> Recording:
        """Record `function`, which reads and writes fixed addresses only. Runs it once before."""
        ...


class CudaRecorder:
    """CUDA graphs in one memory pool. Largest first, so that each one fits into what the first has taken.

    Nothing of one graph outlives its replay but its result, and replays follow one another in one stream:
    so all graphs may use the same memory, results included.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call] # of torch
        self._pool: Any = torch.cuda.graph_pool_handle()

    def capture(self, function: Callable[[], Tensor]) -> Recording:
        """See `Recorder`. The run before compiles kernels and loads modules, which a capture may not."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            function()
            self._stream.synchronize()
            # Not torch.cuda.graph: that collects garbage and empties the cache at each capture. Other
            # threads may use the device meanwhile.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                result = function()
            except BaseException:
                # The capture has to end in any case. That it failed is told by the error that made it fail,
                # which callers look at: memory that is used up is no reason to end.
                with contextlib.suppress(RuntimeError):
                    graph.capture_end()
                raise
            graph.capture_end()
        current.wait_stream(self._stream)
        return _CudaRecording(graph, _alias(result))


class _CudaRecording:
    def __init__(self, graph: torch.cuda.CUDAGraph, result: Tensor) -> None:
        self._graph = graph
        self._result = result

    def replay(self) -> Tensor:
        self._graph.replay()
        return self._result


class _Memory:
    """Memory that the graphs' pool owns, as NumPy's and Numba's array interface describes it."""

    def __init__(self, tensor: Tensor) -> None:
        self.__cuda_array_interface__ = {
            "shape": tuple(tensor.shape),
            "typestr": "<f4",
            "data": (tensor.data_ptr(), False),
            "strides": None,
            "version": 3,
        }


def _alias(result: Tensor) -> Tensor:
    """The same memory without ownership: a tensor that was kept would keep it from the next graphs."""
    if result.dtype != torch.float32 or not result.is_contiguous():
        raise ValueError("what a graph results in must be contiguous float32")
    return torch.as_tensor(_Memory(result), device=result.device)
