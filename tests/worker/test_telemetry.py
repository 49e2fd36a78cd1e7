"""What a worker shows of its GPU, and that it does without."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pynvml
import pytest
import structlog
from fake_nvml import UUID, OneGpu
from structlog.testing import capture_logs

from sfllm.metrics import Metrics
from sfllm_worker import telemetry
from sfllm_worker.engine.planner import Limits
from sfllm_worker.graphs.figures import GraphFigures
from sfllm_worker.metrics import WorkerMetrics
from sfllm_worker.mock.engine import MockEngine
from sfllm_worker.telemetry import GpuTelemetry


def value(metrics: Metrics, name: str, **labels: str) -> float:
    lines = metrics.render().decode().splitlines()
    wanted = [f'{key}="{text}"' for key, text in labels.items()]
    [line] = [line for line in lines if line.startswith(f"t:{name}{{") and all(w in line for w in wanted)]
    return float(line.rsplit(" ", 1)[1])


@pytest.fixture(autouse=True)
def fresh_log(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Neither the level that an earlier test configured, nor a logger that was used then and keeps it."""
    configured = structlog.get_config()
    structlog.reset_defaults()
    monkeypatch.setattr(telemetry, "_log", structlog.get_logger())
    yield
    structlog.configure(**configured)


def worker_metrics() -> tuple[Metrics, WorkerMetrics]:
    metrics = Metrics("t:")
    return metrics, WorkerMetrics(metrics, "m", "w")


def test_a_scrape_reads_the_gpu() -> None:
    metrics, shown = worker_metrics()
    gpu = GpuTelemetry.open(UUID, OneGpu())
    assert gpu is not None
    shown.watch_gpu(gpu)
    assert value(metrics, "gpu_utilization") == 0.37
    assert value(metrics, "gpu_memory_bytes", state="used") == 3 * 2**30
    assert value(metrics, "gpu_memory_bytes", state="free") == 77 * 2**30


def test_a_worker_says_which_gpu_it_has() -> None:
    metrics, shown = worker_metrics()
    shown.gpu(UUID)
    assert value(metrics, "gpu_info", uuid=UUID) == 1


def test_a_gpu_that_is_lost_is_unknown_and_said_once() -> None:
    nvml = OneGpu()
    metrics, shown = worker_metrics()
    gpu = GpuTelemetry.open(UUID, nvml)
    assert gpu is not None
    shown.watch_gpu(gpu)
    nvml.lost = True
    with capture_logs() as logs:
        assert math.isnan(value(metrics, "gpu_utilization"))
        assert math.isnan(value(metrics, "gpu_memory_bytes", state="used"))
    assert [line["reason"] for line in logs] == ["GPU is lost"]
    nvml.lost = False
    assert value(metrics, "gpu_utilization") == 0.37


def test_a_gpu_that_the_driver_does_not_know_is_said_and_not_shown() -> None:
    with capture_logs() as logs:
        assert GpuTelemetry.open("GPU-other", OneGpu()) is None
    assert [line["event"] for line in logs] == ["no GPU metrics"]


def test_a_machine_without_a_driver_is_said_and_shows_nothing() -> None:
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        with capture_logs() as logs:
            assert GpuTelemetry.open(UUID) is None
        assert [line["event"] for line in logs] == ["no GPU metrics"]
    else:
        pytest.skip("this machine has a driver")


def test_steps_are_counted_by_how_they_reached_the_gpu() -> None:
    figures = GraphFigures(captured=3, capture_seconds=1.5, memory_bytes=2**20, eager_steps=4)
    metrics, shown = worker_metrics()
    shown.watch_graphs(figures)
    figures.replays, figures.eager_steps, figures.padding_rows = 7, 6, 5
    engine = MockEngine(
        Limits(max_sequences=2, max_step_tokens=8, block_size=4), kv_tokens=64, max_model_len=32
    )
    for _ in range(2):  # what was counted once is not counted again
        shown.state(engine)
        assert value(metrics, "cuda_graph_replays_total", kind="replay") == 7
        assert value(metrics, "cuda_graph_replays_total", kind="eager") == 2  # without those of the warm-up
        assert value(metrics, "padding_tokens_total") == 5
    assert value(metrics, "cuda_graphs_captured") == 3
    assert value(metrics, "cuda_graph_capture_seconds") == 1.5
    assert value(metrics, "cuda_graph_memory_bytes") == 2**20
