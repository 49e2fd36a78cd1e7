"""Stages through the whole engine: decode steps beside their floor, prefill, idle time, determinism."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from bench.gpu_bench.place import (
    ROUNDS,
    Place,
    Row,
    add_prompts,
    cancel_all,
    run_until_decoding,
)
from torch.profiler import ProfilerActivity, profile

from sfllm_worker.engine.engine import Engine


def decode(place: Place, bandwidth: float | None) -> Iterator[Row]:
    """Steps at several batch sizes over 1k of context each, with graphs and without.

    `bandwidth` is the measured copy bandwidth in bytes a second: the floor is what a step must read over it.
    One form that does not run leaves the other's figures; its error is raised after they are given.
    """
    batches = (1, 2) if place.quick else (1, 8, 32, 64, 128, 256)
    forms: list[tuple[str, dict[str, Any]]] = [("graphs", {}), ("eager", {"disable_cuda_graph": True})]
    found: dict[str, dict[int, float]] = {}
    errors: list[Exception] = []
    for name, options in forms:
        times = found[name] = {}
        try:
            times.update(step_times(place, batches, options))
        except Exception as error:  # noqa: BLE001 - raised below
            errors.append(error)
    context = context_tokens(place)
    for batch in batches:
        each = {name: times[batch] for name, times in found.items() if batch in times}
        row: Row = {"batch": batch, **{f"{name} ms": time_ms for name, time_ms in each.items()}}
        if len(each) == len(forms):
            row["eager / graphs"] = each["eager"] / each["graphs"]
        if bandwidth:
            row["floor ms"] = place.step_bytes([context] * batch) / bandwidth * 1e3
            if "graphs" in each:
                row["% of floor"] = 100 * row["floor ms"] / each["graphs"]
        yield row
    if errors:
        raise errors[0]


def deterministic(place: Place) -> list[Row]:
    """Decode steps with and without `--deterministic`."""
    batches = (1, 2) if place.quick else (1, 8, 64, 256)
    plain = dict(step_times(place, batches, {}))
    fixed = dict(step_times(place, batches, {"deterministic": True}))
    return [
        {
            "batch": batch,
            "ms": plain[batch],
            "--deterministic ms": fixed[batch],
            "cost %": 100 * (fixed[batch] / plain[batch] - 1),
        }
        for batch in batches
    ]


def step_times(place: Place, batches: Sequence[int], options: dict[str, Any]) -> Iterable[tuple[int, float]]:
    """Milliseconds of a decode step by batch size: the median round's mean, steps overlapping as they do."""
    steps = 5 if place.quick else 40
    context = context_tokens(place)
    with place.engine(**sizes(place, max(batches)), **options) as engine:
        captured = place.on_gpu and not options.get("disable_cuda_graph")
        for seed, batch in enumerate(batches):
            output = steps * (ROUNDS + 1) + 16
            add_prompts(engine, batch, context - output // 2, output, place.size().vocabulary, seed)
            run_until_decoding(engine, batch)
            replays = engine.figures.replays
            rounds = [timed_steps(place, engine, steps, batch) for _ in range(ROUNDS)]
            replayed = engine.figures.replays - replays
            assert replayed == (steps * ROUNDS if captured else 0), f"{replayed} steps were graphs"
            yield batch, statistics.median(rounds)
            cancel_all(engine)


def timed_steps(place: Place, engine: Engine, steps: int, batch: int) -> float:
    """Mean milliseconds of steps."""
    started = time.perf_counter()
    for _ in range(steps):
        assert engine.step().num_tokens == batch, "the state was not steady"
    place.synchronize()
    return (time.perf_counter() - started) / steps * 1e3


def prefill(place: Place) -> Iterator[Row]:
    """Prompts of several lengths in steps of up to 8192 tokens."""
    shapes = [(2, 32)] if place.quick else [(64, 128), (16, 512), (4, 2048), (1, 8192)]
    size = place.size()
    long = {} if place.quick else {"max_context_length": 16384}
    with place.engine(**{**sizes(place, 64), **long}, disable_cuda_graph=True) as engine:
        for number, (batch, length) in enumerate(shapes):
            seconds = []
            for attempt in range(ROUNDS + 1):
                add_prompts(engine, batch, length, 1, size.vocabulary, seed=100 * number + attempt)
                started = time.perf_counter()
                while engine.has_work:
                    engine.step()
                place.synchronize()
                seconds.append(time.perf_counter() - started)
            elapsed = statistics.median(seconds[1:])
            tokens = batch * length
            products = 2 * size.layer_weights * tokens + 2 * batch * size.hidden * size.vocabulary
            pairs = batch * length * (length + 1) // 2
            operations = products + 4 * size.layers * size.query_heads * size.head_dim * pairs
            yield {
                "prompts": f"{batch} x {length}",
                "ms": elapsed * 1e3,
                "tokens/s": tokens / elapsed,
                "TFLOP/s": operations / elapsed / 1e12,
            }


def trace(place: Place) -> Iterator[Row]:
    """How much of a steady decode trace the device does nothing, by torch's profiler."""
    kind = "CUDA" if place.on_gpu else "CPU"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if place.on_gpu else [])]
    steps = 3 if place.quick else 30
    batches = (2,) if place.quick else (1, 64)
    with place.engine(**sizes(place, max(batches))) as engine:
        for seed, batch in enumerate(batches):
            add_prompts(
                engine, batch, context_tokens(place) // 2, 8 * steps + 16, place.size().vocabulary, seed
            )
            run_until_decoding(engine, batch)
            # The first trace of a process pays for the tracer's own start.
            for _ in range(1 if place.quick else 2):
                with profile(activities=activities, acc_events=True) as profiler:
                    for _ in range(steps):
                        engine.step()
                    place.synchronize()
            busy = [
                (event.time_range.start, event.time_range.end)
                for event in profiler.events()
                if event.device_type.name == kind
            ]
            yield {"batch": batch, "launches a step": len(busy) / steps, "idle %": 100 * idle_share(busy)}
            cancel_all(engine)


def idle_share(busy: Iterable[tuple[float, float]]) -> float:
    """The share of the time from the first start to the last end in which none of the intervals runs."""
    intervals = sorted(busy)
    if not intervals:
        raise ValueError("a trace without a single interval has no idle share")
    begin, reach, idle = intervals[0][0], intervals[0][1], 0.0
    for start, end in intervals[1:]:
        idle += max(0.0, start - reach)
        reach = max(reach, end)
    return idle / (reach - begin) if reach > begin else 0.0


def context_tokens(place: Place) -> int:
    """The context at which steps are measured, on average over the measured steps."""
    return 64 if place.quick else 1024


def sizes(place: Place, batch: int) -> dict[str, Any]:
    """An engine with room for that batch at the measured context, some tokens more each."""
    longest = 256 if place.quick else 2048
    return {
        "max_context_length": longest,
        "max_batch_size": batch,
        "max_step_tokens": 512 if place.quick else 8192,
        "max_running_tokens": batch * (context_tokens(place) + 256),
    }
