"""How full the stack is, by two looks a moment apart: caches, queues, refusals."""

from __future__ import annotations

from collections.abc import Iterator

from sfllm_cli.doctor.evidence import Evidence, Process
from sfllm_cli.doctor.findings import Finding, ok, problem, warning

KV_NEAR_FULL = 0.95
QUEUE_GROWS = 2
"""By so many requests between the looks: one more may be one that came a moment ago."""


def check_load(evidence: Evidence) -> Iterator[Finding]:
    """KV caches of the workers, queues of the schedulers."""
    for worker in evidence.of_role("worker"):
        yield _cache(worker)
    for scheduler in evidence.of_role("scheduler"):
        yield _queue(scheduler)


def _cache(worker: Process) -> Finding:
    check, used = f"KV cache of {worker.name}", worker.after.total("kv_cache_usage_perc") or 0.0
    preempted = grown(worker, "num_preemptions_total")
    if preempted:
        return warning(
            check,
            f"{used:.0%} used, and {preempted:.0f} sequences just lost their blocks, to be computed again",
            "add workers or memory (--mem-fraction), or lower --max-batch-size",
        )
    if used >= KV_NEAR_FULL:
        return warning(
            check,
            f"{used:.0%} used: new sequences wait for blocks",
            "if it stays so, add workers or memory (--mem-fraction), or lower --max-context-length",
        )
    return ok(check, f"{used:.0%} used")


def _queue(scheduler: Process) -> Finding:
    check = f"queue of {scheduler.name}"
    waiting = scheduler.after.total("num_requests_waiting") or 0.0
    stranded = scheduler.after.total("num_requests_waiting_by_reason", reason="no_worker") or 0.0
    refused, growth = (
        grown(scheduler, name) for name in ("admission_rejections_total", "num_requests_waiting")
    )
    if stranded:
        return problem(
            check,
            f"{stranded:.0f} requests wait for a model that no worker serves",
            "start a worker of that model; they fail after --worker-wait-seconds",
        )
    if refused > 0:
        return warning(
            check,
            f"{refused:.0f} requests were refused just now, {waiting:.0f} wait",
            "add workers, raise --max-queue-requests, or look at the limits of tenants",
        )
    if growth >= QUEUE_GROWS:
        return warning(
            check,
            f"{waiting:.0f} requests wait, {growth:.0f} more than a moment ago",
            "if it goes on, more comes than is served: add workers (`sfllm simulate` says how many)",
        )
    return ok(check, f"{waiting:.0f} requests wait, and it does not grow")


def grown(process: Process, name: str) -> float:
    """By how much it became more between the looks. A label that was not there was at 0."""
    return (process.after.total(name) or 0.0) - (process.before.total(name) or 0.0)
