"""Each process by itself and all together: whether it answers, versions, clocks, limits of the system."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from sfllm_cli.doctor.evidence import Api, Evidence, Process
from sfllm_cli.doctor.findings import Finding, ok, problem, warning
from sfllm_cli.doctor.probe import Answer

CLOCK_SECONDS = 2.0
"""Clocks that NTP keeps differ by milliseconds."""

FILES_WARN, FILES_FULL = 0.8, 0.95
FILES_BESIDE_STREAMS = 256
"""What a gateway has open besides its clients: links, files, connections that wait for a next request."""

STREAMS_WARN = 0.9


def check_processes(evidence: Evidence) -> Iterator[Finding]:
    """Whether every process whose port was named is there and well."""
    if not evidence.processes:
        yield ok(
            "admin ports",
            "none was named, so schedulers and workers are seen through the gateway alone",
            "start them with --admin-port and name the ports: --admin HOST:PORT HOST:PORT",
        )
    for process in evidence.processes:
        yield _answers(process)


def _answers(process: Process) -> Finding:
    check, health = process.name, process.health
    if not health.status:
        return _silent(check, process.health)
    if not process.known:
        by = f" ({process.occupant})" if process.occupant else ""
        return problem(
            check,
            f"the port is taken by something that is not of sfllm{by}",
            "check the port, or give the process another --admin-port",
        )
    if not health.ok:
        return problem(check, f"it cannot go on: {health.reason()}", "restart it, and keep its log")
    if not process.ready.ok:
        return problem(
            check, f"it lives but is not ready: {process.ready.reason()}", "mend what it says it waits for"
        )
    return ok(check, "lives and is ready")


def _silent(check: str, health: Answer) -> Finding:
    if health.failure == "refused":
        return problem(
            check, "nothing listens there", "read that process's log and start it again with its --admin-port"
        )
    if health.failure == "timeout":
        return problem(
            check, "no answer in time", "it hangs or is stopped, or a firewall is between: look at its log"
        )
    return problem(check, f"it cannot be reached: {health.detail}", "check the address and the network")


def check_versions(evidence: Evidence, own: str) -> Iterator[Finding]:
    """Whether all run the same release; `own` is that of this command."""
    everyone = evidence.everyone()
    if not everyone:
        return
    versions: dict[str, list[str]] = defaultdict(list)
    for process in everyone:
        told = process.version.fields().get("version") if process.version.ok else None
        versions[str(told or "unknown")].append(process.name)
    versions.setdefault(own, []).append("this command")
    if len(versions) == 1:
        yield ok("versions", f"all run {own}")
        return
    shown = "; ".join(f"{version}: {', '.join(names)}" for version, names in sorted(versions.items()))
    yield warning(
        "versions", f"they differ: {shown}", "finish the upgrade: install one version and restart the others"
    )


def check_protocols(evidence: Evidence) -> Iterator[Finding]:
    """Whether all speak one version of the protocol: those that do not cannot work together."""
    protocols: dict[str, list[str]] = defaultdict(list)
    for process in evidence.everyone():
        told = process.version.fields().get("protocol") if process.version.ok else None
        if told is not None:
            protocols[str(told)].append(process.name)
    if len(protocols) == 1:
        yield ok("protocol", f"all speak version {next(iter(protocols))}")
    elif protocols:
        shown = "; ".join(f"{version}: {', '.join(names)}" for version, names in sorted(protocols.items()))
        yield problem(
            "protocol",
            f"they speak different versions, and do not understand each other: {shown}",
            "upgrade what is left of the older version, scheduler first",
        )


def check_clocks(evidence: Evidence) -> Iterator[Finding]:
    """Whether the processes' clocks and this machine's agree, as far as whole seconds tell."""
    offsets = {
        process.name: process.health.clock
        for process in evidence.everyone()
        if process.health.clock is not None
    }
    if not offsets:
        return
    ahead = max(offsets, key=lambda name: offsets[name].least)
    behind = min(offsets, key=lambda name: offsets[name].most)
    # This machine's own clock is one of those compared.
    most, least = max(offsets[ahead].least, 0.0), min(offsets[behind].most, 0.0)
    if most - least <= CLOCK_SECONDS:
        yield ok(
            "clocks", f"{len(offsets)} processes and this machine agree to about {CLOCK_SECONDS:.0f} seconds"
        )
        return
    late = behind if least < 0 else "this machine"
    early = ahead if most > 0 else "this machine"
    yield warning(
        "clocks",
        f"{early} is at least {most - least:.0f} s ahead of {late}: times in logs and traces do not fit",
        "run an NTP client (chrony, systemd-timesyncd) on every host",
    )


def check_limits(evidence: Evidence) -> Iterator[Finding]:
    """Open files of every process, and whether a gateway may open as many as it takes streams."""
    everyone = evidence.everyone()
    yield from _files(everyone)
    if evidence.api.info.ok:
        yield from _streams(evidence.api)


def _files(everyone: Sequence[Process]) -> Iterator[Finding]:
    shares = {}
    for process in everyone:
        used, limit = (process.after.total(f"process_{name}_fds") for name in ("open", "max"))
        if used is not None and limit:
            shares[process.name] = (used / limit, used, limit)
    if not shares:
        return
    name = max(shares, key=lambda name: shares[name][0])
    share, used, limit = shares[name]
    meaning = f"{name} has {used:.0f} of {limit:.0f} open"
    remedy = "raise the limit: `ulimit -n 65536`, or LimitNOFILE of its unit"
    if share >= FILES_FULL:
        yield problem("open files", f"{meaning}: new connections fail soon", remedy)
    elif share >= FILES_WARN:
        yield warning("open files", meaning, remedy)
    else:
        yield ok("open files", f"{meaning}, the most of all")


def _streams(api: Api) -> Iterator[Finding]:
    fields = api.info.fields()
    most, opened = int(fields.get("max_streams", 0)), int(fields.get("open_requests", 0))
    files = api.process.after.total("process_max_fds")
    if files and most + FILES_BESIDE_STREAMS > files:
        yield warning(
            "streams",
            f"the gateway may take {most} requests, but open only {files:.0f} files",
            "raise the limit (`ulimit -n 65536`), or lower --max-streams",
        )
    elif most and opened >= STREAMS_WARN * most:
        yield warning(
            "streams",
            f"{opened} of {most} are open: beyond that requests end with 429",
            "run more gateways, or raise --max-streams",
        )
    else:
        yield ok("streams", f"{opened} of {most} are open")
