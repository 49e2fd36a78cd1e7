"""What a worker measures of itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from sfllm.messages import ModelCard
from sfllm.metrics import TOKEN_COUNT_BUCKETS, TOKEN_LATENCY_BUCKETS, Metrics
from sfllm_worker.engine.interface import EngineInterface, StepResult
from sfllm_worker.graphs.figures import GraphFigures
from sfllm_worker.structured.figures import GrammarFigures
from sfllm_worker.telemetry import GpuTelemetry

STEP_COST_PARTS = ("base", "prefill_token", "decode", "context_token")


class WorkerMetrics:
    """The worker's metrics, all with the labels `model_name` and `worker`."""

    def __init__(self, metrics: Metrics, model_name: str, worker_id: str) -> None:
        labels = ("model_name", "worker")
        self._metrics = metrics
        self._values = (model_name, worker_id)
        sequences = metrics.gauge("worker_sequences", "Sequences in this worker by state", (*labels, "state"))
        self._running = sequences.labels(*self._values, "running")
        self._waiting = sequences.labels(*self._values, "waiting")
        blocks = metrics.gauge("kv_blocks", "Blocks of the KV cache by state", (*labels, "state"))
        self._free_blocks = blocks.labels(*self._values, "free")
        self._used_blocks = blocks.labels(*self._values, "used")
        self._kv_usage = metrics.gauge(
            "kv_cache_usage_perc", "Share of the KV cache's blocks in use, 0 to 1", labels
        ).labels(*self._values)
        self._pending_prefill = metrics.gauge(
            "pending_prefill_tokens",
            "Prompt tokens to compute before sequences can go on; of one, a step's worth at most",
            labels,
        ).labels(*self._values)
        self._slots = metrics.gauge(
            "sequence_slots", "Sequences that this worker takes at a time now", labels
        ).labels(*self._values)
        cost = metrics.gauge(
            "step_cost_seconds",
            "What a step takes: in any case, for each prompt token, decode and token of its context",
            (*labels, "part"),
        )
        self._step_cost = [cost.labels(*self._values, part) for part in STEP_COST_PARTS]
        self._preemptions = metrics.counter(
            "num_preemptions_total", "Sequences whose blocks were taken back to be computed again", labels
        ).labels(*self._values)
        self._step_tokens = metrics.histogram(
            "iteration_tokens_total", "Tokens computed in a step", TOKEN_COUNT_BUCKETS, labels
        ).labels(*self._values)
        self._step_seconds = metrics.histogram(
            "step_duration_seconds", "Duration of a step", TOKEN_LATENCY_BUCKETS, labels
        ).labels(*self._values)
        self._prefix_queries = metrics.counter(
            "prefix_cache_queries_total", "Tokens of admitted sequences looked up in the prefix cache", labels
        ).labels(*self._values)
        self._prefix_hits = metrics.counter(
            "prefix_cache_hits_total", "Tokens of admitted sequences found in the prefix cache", labels
        ).labels(*self._values)
        self._seen_queries = self._seen_hits = 0
        self._startup = metrics.gauge(
            "startup_seconds", "Duration of each phase of the start", (*labels, "phase")
        )
        self._graphs: _GraphMetrics | None = None
        self._grammars: _GrammarMetrics | None = None

    def startup(self, phase: str, seconds: float) -> None:
        """How long one phase of the start took."""
        self._startup.labels(*self._values, phase).set(seconds)

    def model(self, card: ModelCard) -> None:
        """What this worker serves: workers of one name must have one fingerprint."""
        names = ("fingerprint", "max_model_len", "quantization")
        info = self._metrics.gauge(
            "model_info", "1 for the model that a worker serves", ("model_name", "worker", *names)
        )
        info.labels(*self._values, *(str(getattr(card, name)) for name in names)).set(1)

    def gpu(self, uuid: str) -> None:
        """Which GPU this worker has."""
        info = self._metrics.gauge(
            "gpu_info", "1 for the GPU that a worker has, by its UUID", ("model_name", "worker", "uuid")
        )
        info.labels(*self._values, uuid).set(1)

    def watch_gpu(self, telemetry: GpuTelemetry) -> None:
        """Show utilization and memory of the worker's GPU, read at each scrape."""
        labels = ("model_name", "worker")
        utilization = self._metrics.gauge(
            "gpu_utilization", "Share of the time in which the GPU ran anything, 0 to 1", labels
        )
        utilization.labels(*self._values).set_function(telemetry.utilization)
        memory = self._metrics.gauge("gpu_memory_bytes", "Memory of the GPU by state", (*labels, "state"))
        memory.labels(*self._values, "used").set_function(lambda: telemetry.memory().used)
        memory.labels(*self._values, "free").set_function(lambda: telemetry.memory().free)

    def watch_graphs(self, figures: GraphFigures) -> None:
        """Show how steps reach the GPU."""
        self._graphs = _GraphMetrics(self._metrics, self._values, figures)

    def watch_grammars(self, figures: GrammarFigures) -> None:
        """Show what compiling grammars takes, and how many are found compiled."""
        self._grammars = _GrammarMetrics(self._metrics, self._values, figures)

    def step(self, result: StepResult, seconds: float) -> None:
        """Account for a step."""
        if result.preempted:
            self._preemptions.inc(result.preempted)
        self._step_tokens.observe(result.num_tokens)
        self._step_seconds.observe(seconds)

    def step_curve(self, parts: Sequence[float]) -> None:
        """What steps take: the parts of a `StepCurve`, or nothing while it is unknown."""
        for gauge, seconds in zip(self._step_cost, parts, strict=False):
            gauge.set(seconds)

    def state(self, engine: EngineInterface) -> None:
        """Show what the engine holds now."""
        used_tokens = engine.kv_tokens - engine.free_kv_tokens
        self._prefix_queries.inc(engine.prefix_queried_tokens - self._seen_queries)
        self._prefix_hits.inc(engine.prefix_hit_tokens - self._seen_hits)
        self._seen_queries, self._seen_hits = engine.prefix_queried_tokens, engine.prefix_hit_tokens
        self._running.set(engine.num_running)
        self._waiting.set(engine.num_waiting)
        self._pending_prefill.set(engine.pending_prefill_tokens)
        self._slots.set(engine.slots)
        self._kv_usage.set(used_tokens / engine.kv_tokens)
        self._free_blocks.set(engine.free_kv_tokens // engine.kv_block_tokens)
        self._used_blocks.set(used_tokens // engine.kv_block_tokens)
        if self._graphs is not None:
            self._graphs.update()
        if self._grammars is not None:
            self._grammars.update()


class _GraphMetrics:
    """What a runner has done, as metrics."""

    def __init__(self, metrics: Metrics, values: tuple[str, str], figures: GraphFigures) -> None:
        labels = ("model_name", "worker")
        self._figures = figures
        self._seen = dataclasses.replace(figures)
        captured = metrics.gauge("cuda_graphs_captured", "CUDA graphs that are there", labels)
        captured.labels(*values).set_function(lambda: figures.captured)
        seconds = metrics.gauge("cuda_graph_capture_seconds", "Time that their capture took", labels)
        seconds.labels(*values).set_function(lambda: figures.capture_seconds)
        memory = metrics.gauge("cuda_graph_memory_bytes", "GPU memory that they took", labels)
        memory.labels(*values).set_function(lambda: figures.memory_bytes)
        steps = metrics.counter(
            "cuda_graph_replays_total",
            "Steps by how they reached the GPU: replay of a graph, or eager",
            (*labels, "kind"),
        )
        self._replays = steps.labels(*values, "replay")
        self._eager = steps.labels(*values, "eager")
        self._padding = metrics.counter(
            "padding_tokens_total", "Rows of replayed graphs that belonged to no sequence", labels
        ).labels(*values)

    def update(self) -> None:
        """Count what came since the last time."""
        now, seen = dataclasses.replace(self._figures), self._seen
        self._replays.inc(now.replays - seen.replays)
        self._eager.inc(now.eager_steps - seen.eager_steps)
        self._padding.inc(now.padding_rows - seen.padding_rows)
        self._seen = now


class _GrammarMetrics:
    """What became of the grammars that were asked for, as metrics."""

    def __init__(self, metrics: Metrics, values: tuple[str, str], figures: GrammarFigures) -> None:
        labels = ("model_name", "worker")
        self._figures = figures
        self._seen_asked = self._seen_found = 0
        self._seconds = metrics.histogram(
            "grammar_compile_seconds", "Duration of a grammar's compilation", TOKEN_LATENCY_BUCKETS, labels
        ).labels(*values)
        self._queries = metrics.counter(
            "grammar_cache_queries_total", "Times that a sequence wanted a grammar", labels
        ).labels(*values)
        self._hits = metrics.counter(
            "grammar_cache_hits_total", "Those whose grammar was there, or being compiled", labels
        ).labels(*values)

    def update(self) -> None:
        """Count what came since the last time."""
        asked, found = self._figures.asked, self._figures.found
        self._queries.inc(asked - self._seen_asked)
        self._hits.inc(found - self._seen_found)
        self._seen_asked, self._seen_found = asked, found
        while self._figures.compile_seconds:
            self._seconds.observe(self._figures.compile_seconds.popleft())
