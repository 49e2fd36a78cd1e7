"""The links between the services: whether they are encrypted, and whom the scheduler turns away."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sfllm_cli.doctor.evidence import Evidence, Process
from sfllm_cli.doctor.findings import Finding, ok, problem, warning
from sfllm_cli.doctor.load_checks import grown

REFUSED, MALFORMED = "scheduler_links_refused_total", "malformed_messages_total"


def check_links(evidence: Evidence) -> Iterator[Finding]:
    """Encryption of all that were asked, and refusals of each scheduler."""
    yield from _encryption(evidence)
    for scheduler in evidence.of_role("scheduler"):
        yield _peers(scheduler)


def _encryption(evidence: Evidence) -> Iterator[Finding]:
    # A gateway that was asked at both of its ports is one process, and its admin port tells the same.
    asked = evidence.processes or ((evidence.api.process,) if evidence.api.process.known else ())
    told = [(process, process.after.total("links_encrypted")) for process in asked]
    plain = [process for process, value in told if value == 0]
    encrypted = [process for process, value in told if value]
    check = "encryption of links"
    if plain and encrypted:
        yield problem(
            check,
            f"some encrypt and others do not, so they cannot reach each other: without keys: {_names(plain)}",
            "make keys with `sfllm keys links DIR` and give every process its file as --link-keys",
        )
    elif plain and evidence.elsewhere:
        yield warning(
            check,
            "they are not encrypted beyond this machine: whoever is on the way can read prompts and answers",
            "make keys with `sfllm keys links DIR` and give every process its file as --link-keys",
        )
    elif plain:
        yield ok(check, "they are not encrypted, and all that was asked is on this machine")
    elif encrypted:
        yield ok(check, f"{len(encrypted)} processes encrypt them, and know each other by keys")


def _names(processes: Sequence[Process]) -> str:
    return ", ".join(process.name for process in processes)


def _peers(scheduler: Process) -> Finding:
    check = f"peers of {scheduler.name}"
    if refused := grown(scheduler, REFUSED):
        return problem(
            check,
            f"{refused:.0f} connections were just refused for their keys ({_sockets(scheduler, REFUSED)})",
            "its log names them: give them keys with `sfllm keys links DIR --add`, or find out who that is",
        )
    if malformed := grown(scheduler, MALFORMED):
        return problem(
            check,
            f"{malformed:.0f} messages could not be read just now ({_sockets(scheduler, MALFORMED)} so far)",
            "its log names the senders: most likely they speak another version of the protocol",
        )
    if before := scheduler.after.total(REFUSED):
        return warning(
            check,
            f"{before:.0f} connections were refused for their keys since it started "
            f"({_sockets(scheduler, REFUSED)})",
            "look in its log whether that was somebody who should be let in",
        )
    return ok(check, "nobody is refused")


def _sockets(scheduler: Process, name: str) -> str:
    """How many there were at each socket."""
    lines = [line for line in scheduler.after.find(name) if line.value]
    return ", ".join(
        f"{line.labels.get('socket') or line.labels.get('link')} {line.value:.0f}" for line in lines
    )
