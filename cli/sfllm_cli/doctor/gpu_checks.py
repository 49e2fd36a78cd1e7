"""Which worker has which GPU: none to itself, none at all, or one that is another's as well."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from sfllm_cli.doctor.evidence import Evidence, Process
from sfllm_cli.doctor.findings import Finding, ok, warning

CHECK = "use of GPUs"


def check_gpus(evidence: Evidence) -> Iterator[Finding]:
    """Nothing where no worker runs a model: made-up tokens need no GPU."""
    workers = evidence.of_role("worker")
    users: dict[str, list[str]] = defaultdict(list)
    for worker in workers:
        for info in worker.after.find("gpu_info"):
            users[info.labels["uuid"]].append(worker.name)
    if not users:
        yield from _unused(evidence, workers)
        return
    shared = {uuid: names for uuid, names in users.items() if len(names) > 1}
    for uuid, names in sorted(shared.items()):
        yield warning(
            CHECK,
            f"{uuid} is shared by {', '.join(names)}",
            "give the workers of its host the same --gpu-claims, or run one worker for each GPU",
        )
    if not shared:
        yield ok(CHECK, f"{len(users)} of {len(workers)} workers have one, each its own")


def _unused(evidence: Evidence, workers: Sequence[Process]) -> Iterator[Finding]:
    there = evidence.machine is not None and evidence.machine.gpus.names
    if there and any(worker.after.find("startup_seconds") for worker in workers):
        yield warning(
            CHECK,
            "there are GPUs, and every worker runs on the CPU",
            "look at --device and CUDA_VISIBLE_DEVICES, and at the finding on torch",
        )
