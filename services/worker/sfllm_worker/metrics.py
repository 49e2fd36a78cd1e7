"""What a worker measures of itself."""

from __future__ import annotations

from sfllm.metrics import TOKEN_COUNT_BUCKETS, TOKEN_LATENCY_BUCKETS, Metrics
from sfllm_worker.engine.interface import EngineInterface, StepResult


class WorkerMetrics:
    """The worker's metrics, all with the labels `model_name` and `worker`."""

    def __init__(self, metrics: Metrics, model_name: str, worker_id: str) -> None:
        labels = ("model_name", "worker")
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

    def startup(self, phase: str, seconds: float) -> None:
        """How long one phase of the start took."""
        self._startup.labels(*self._values, phase).set(seconds)

    def step(self, result: StepResult, seconds: float) -> None:
        """Account for a step."""
        self._preemptions.inc(result.preempted)
        self._step_tokens.observe(result.num_tokens)
        self._step_seconds.observe(seconds)

    def state(self, engine: EngineInterface) -> None:
        """Show what the engine holds now."""
        used_tokens = engine.kv_tokens - engine.free_kv_tokens
        self._prefix_queries.inc(engine.prefix_queried_tokens - self._seen_queries)
        self._prefix_hits.inc(engine.prefix_hit_tokens - self._seen_hits)
        self._seen_queries, self._seen_hits = engine.prefix_queried_tokens, engine.prefix_hit_tokens
        self._running.set(engine.num_running)
        self._waiting.set(engine.num_waiting)
        self._kv_usage.set(used_tokens / engine.kv_tokens)
        self._free_blocks.set(engine.free_kv_tokens // engine.kv_block_tokens)
        self._used_blocks.set(used_tokens // engine.kv_block_tokens)
