"""What is here: disk for caches, GPUs against driver and torch, native kernels."""

from __future__ import annotations

from collections.abc import Iterator

from sfllm_cli.doctor.evidence import Evidence
from sfllm_cli.doctor.findings import Finding, ok, problem, warning
from sfllm_cli.doctor.machine import Disk, Gpus, Kernels, Torch

GIB = 2**30
DISK_LOW, DISK_FULL = 5 * GIB, GIB // 2
"""Below the first a small model may not fit, below the second not even the default one."""


def check_machine(evidence: Evidence) -> Iterator[Finding]:
    """What there is here; nothing when no part of the stack is on this machine."""
    machine = evidence.machine
    if machine is None:
        return
    for disk in machine.disks:
        yield _disk(disk)
    yield _gpus(machine.gpus)
    if machine.torch is not None:
        yield _torch(machine.torch, machine.gpus)
        if not machine.gpus.names:
            yield _kernels(machine.kernels)


def _disk(disk: Disk) -> Finding:
    check, meaning = f"disk of {disk.path}", f"{disk.free_bytes / GIB:.1f} GiB free"
    remedy = "free some, or put caches elsewhere: SFLLM_CACHE_DIR, HF_HOME, TMPDIR"
    if disk.fault:
        return problem(check, disk.fault, "mend its rights, or put caches elsewhere: SFLLM_CACHE_DIR, TMPDIR")
    if disk.free_bytes < DISK_FULL:
        return problem(check, f"{meaning}: models cannot be fetched or converted", remedy)
    if disk.free_bytes < DISK_LOW:
        return warning(check, f"{meaning}: larger models do not fit", remedy)
    return ok(check, meaning)


def _gpus(gpus: Gpus) -> Finding:
    if gpus.fault:
        return problem(
            "GPU",
            gpus.fault,
            "install the driver that fits the kernel; give a container the GPU and its driver",
        )
    if not gpus.names:
        return ok("GPU", "none here: workers run on the CPU")
    cuda = ".".join(map(str, gpus.cuda)) if gpus.cuda else "unknown"
    return ok("GPU", f"{len(gpus.names)}, driver {gpus.driver or 'unknown'}, which runs CUDA up to {cuda}")


def _torch(torch: Torch, gpus: Gpus) -> Finding:
    check = "torch"
    if torch.cuda is None:
        if gpus.names:
            return problem(
                check,
                f"torch {torch.version} is built for CPUs, so no worker can use the GPU",
                "install torch's build for CUDA; docs/gpu.md says how",
            )
        return ok(check, f"torch {torch.version}, built for CPUs")
    built = ".".join(map(str, torch.cuda))
    # Within one major version of CUDA an older driver runs what was built with a newer toolkit.
    if gpus.cuda is not None and torch.cuda[0] > gpus.cuda[0]:
        return problem(
            check,
            f"torch {torch.version} needs CUDA {built}; the driver runs only {gpus.cuda[0]}.{gpus.cuda[1]}",
            f"update the driver, or install torch's build for CUDA {gpus.cuda[0]}",
        )
    if not gpus.names:
        return ok(check, f"torch {torch.version}, built for CUDA {built}, with no GPU to run on")
    return ok(check, f"torch {torch.version}, built for CUDA {built}, which the driver runs")


def _kernels(kernels: Kernels) -> Finding:
    check = "native kernels"
    if kernels.built:
        return ok(check, "they are built for a CPU of this cache directory")
    if kernels.compiler:
        return ok(check, f"not built yet: the first worker does it, with {kernels.compiler}")
    return warning(
        check,
        "not built, and there is no C++ compiler: models run in plain torch, several times slower",
        "install g++ (Debian: apt install g++), or set CXX, and restart the workers",
    )
