"""The gateway as its clients see it: whether it is there and ready, who is let in, its certificate."""

from __future__ import annotations

from collections.abc import Iterator

from sfllm_cli.doctor.evidence import Api, Evidence, Process
from sfllm_cli.doctor.findings import Finding, ok, problem, warning

WARN_DAYS = 21.0
"""Certificates of public authorities are renewed 30 days ahead: one with less left was forgotten."""

_REMEDIES = (
    ("scheduler cannot be reached", "start a scheduler, and give both sides the same --gateway-address"),
    ("no model is known", "start a worker, and give it and the scheduler the same --worker-address"),
    ("no worker is there", "read the worker's log and start it again: its last lines say why it ended"),
    ("protocol version", "upgrade what is left of the older version, scheduler first"),
    ("shutting down", "wait for it to end; others should take its requests meanwhile"),
    ("tokenizer", "wait a moment; if it stays, check --asset-address of scheduler, gateway and worker"),
)


def check_api(evidence: Evidence) -> Iterator[Finding]:
    """All checks of the gateway; only the first if nothing answers."""
    api = evidence.api
    yield _reachable(api.process, api.answers)
    if api.answers:
        yield _ready(api.process)
        yield _keys(api)
        if api.keyed is not None or api.process.tls:
            yield from _key_and_tls(api)


def _reachable(process: Process, answers: bool) -> Finding:
    check, where = "gateway", process.address
    health = process.health
    if answers:
        return ok(check, f"answers at {where}")
    if health.failure == "refused":
        return problem(
            check, f"nothing listens at {where}", "start it with `sfllm serve`, or name it with --url"
        )
    if health.failure == "timeout":
        return problem(
            check, f"no answer from {where} in time", "check firewalls, and whether it is overloaded"
        )
    if health.failure == "unreachable":
        return problem(
            check, f"{where} cannot be reached: {health.detail}", "check the address and the network"
        )
    if health.failure == "protocol":
        other = "http" if process.tls else "https"
        return problem(check, f"{where} breaks off: {health.detail}", f"try --url {other}://{where}")
    return problem(
        check,
        f"{where} is taken by something else{_by(process)}: /health answers {health.status}",
        "stop that, or give the gateway another --port",
    )


def _by(process: Process) -> str:
    return f" ({process.occupant})" if process.occupant else ""


def _ready(process: Process) -> Finding:
    if process.ready.ok:
        return ok("ready", "a request can be served now")
    reason = process.ready.reason()
    remedy = next((remedy for part, remedy in _REMEDIES if part in reason), "read the gateway's log")
    return problem("ready", f"no request can be served: {reason}", remedy)


def _keys(api: Api) -> Finding:
    check = "API keys"
    if api.unkeyed.status == 401:
        return ok(check, "requests without a key are refused")
    if not api.unkeyed.ok:
        return warning(
            check,
            f"/v1/models answers {api.unkeyed.status or 'nothing'}: {api.unkeyed.reason()}",
            "look at the other findings first",
        )
    if api.exposed:
        return problem(
            check,
            "everyone who can reach this machine can use the API: it listens beyond loopback, without keys",
            "make keys with `sfllm keys add` and give their file as --api-key-file, or --host 127.0.0.1",
        )
    return ok(check, "no key is needed, and only this machine can reach the API")


def _key_and_tls(api: Api) -> Iterator[Finding]:
    if api.keyed is not None:
        yield _given_key(api)
    if api.certificate is not None:
        yield from _certificate(api)


def _given_key(api: Api) -> Finding:
    check = "your key"
    assert api.keyed is not None
    if not api.keyed.ok:
        return problem(
            check,
            f"the given key is refused: {api.keyed.reason()}",
            "check SFLLM_API_KEY for blanks and line ends; `sfllm keys add` makes another",
        )
    if api.remote and not api.process.tls:
        return warning(
            check,
            "it works, and travels unencrypted: everyone on the way can read it",
            "serve HTTPS with --tls-cert-file and --tls-key-file, or behind nginx",
        )
    return ok(check, "it works" if api.unkeyed.status == 401 else "it works, though none is needed")


def _certificate(api: Api) -> Iterator[Finding]:
    check, certificate = "certificate", api.certificate
    assert certificate is not None
    renew = "renew it, and restart the gateways one after the other"
    if certificate.days_left is None:
        yield warning(check, f"it cannot be read: {certificate.fault}", "check --tls-cert-file")
    elif certificate.days_left <= 0:
        yield problem(check, "it is not valid now: it has expired, or begins later", renew)
    elif certificate.days_left < WARN_DAYS:
        yield warning(check, f"it expires in {certificate.days_left:.0f} days", renew)
    else:
        yield ok(check, f"it is valid for {certificate.days_left:.0f} more days")
    if certificate.refusal and (certificate.days_left or 0) > 0:
        yield warning(
            "certificate's name",
            f"clients here refuse it: {certificate.refusal}",
            "ask by a name that it is for; of an authority of your own, set SSL_CERT_FILE to its certificate",
        )
