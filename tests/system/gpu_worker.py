"""The metrics of a worker with a model on a GPU, by the worker's own code, where there is neither."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fake_nvml import UUID, OneGpu

from sfllm.admin import AdminServer
from sfllm.metrics import Metrics
from sfllm_worker.engine.planner import Limits
from sfllm_worker.graphs.figures import GraphFigures
from sfllm_worker.metrics import WorkerMetrics
from sfllm_worker.mock.engine import MockEngine
from sfllm_worker.structured.figures import GrammarFigures
from sfllm_worker.telemetry import GpuTelemetry


class GpuWorker:
    """What such a worker shows at `port`."""

    def __init__(self) -> None:
        registry = Metrics("sfllm:")
        self._engine = MockEngine(Limits(2, 8, 4), kv_tokens=64, max_model_len=32)
        self._figures = GraphFigures(captured=3, capture_seconds=1.5, memory_bytes=2**20)
        self._metrics = WorkerMetrics(registry, "model-on-a-gpu", "w-gpu")
        self._metrics.startup("load", 2.5)
        self._metrics.gpu(UUID)
        telemetry = GpuTelemetry.open(UUID, OneGpu())
        assert telemetry is not None
        self._metrics.watch_gpu(telemetry)
        self._metrics.watch_graphs(self._figures)
        self._grammars = GrammarFigures()
        self._metrics.watch_grammars(self._grammars)
        self._admin = AdminServer("127.0.0.1", 0, registry, lambda: None)
        self.port = self._admin.port

    def work(self) -> None:
        """Show some steps more."""
        self._figures.replays += 9
        self._figures.eager_steps += 1
        self._figures.padding_rows += 4
        self._grammars.asked += 3
        self._grammars.found += 2
        self._grammars.compile_seconds.append(0.01)
        self._metrics.state(self._engine)

    def close(self) -> None:
        self._admin.close()


@contextmanager
def gpu_worker() -> Iterator[GpuWorker]:
    """One for as long as the block lasts."""
    worker = GpuWorker()
    try:
        yield worker
    finally:
        worker.close()
