"""Files of keys: whether they can be used, by those alone whom they are for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sfllm_cli.doctor.evidence import Evidence
from sfllm_cli.doctor.findings import Finding, ok, problem, warning
from sfllm_cli.doctor.key_files import ApiKeyFile, LinkKeyFile

WRITABLE_BY_OTHERS = 0o022


def check_keys(evidence: Evidence) -> Iterator[Finding]:
    """The files that were named; nothing of those that were not."""
    if evidence.api_keys is not None:
        yield _api_keys(evidence.api_keys)
    sound = [file for file in evidence.link_keys if not file.fault]
    for file in evidence.link_keys:
        yield _link_keys(file, [each for each in sound if each.role == "scheduler"])


def _api_keys(file: ApiKeyFile) -> Finding:
    check = f"API keys in {file.path}"
    if file.fault:
        return problem(
            check,
            f"a gateway cannot use it: {file.fault}",
            "make it with `sfllm keys add NAME FILE`, readable for the gateway's user",
        )
    if file.mode & WRITABLE_BY_OTHERS:
        return problem(
            check,
            "others than its owner may change it, and so let themselves in",
            f"chmod go-w {file.path}",
        )
    if not file.keys:
        return warning(
            check, "it has no key, so that nobody is let in", "`sfllm keys add NAME FILE` adds one"
        )
    return ok(check, f"{file.keys} keys, which only its owner may change")


def _link_keys(file: LinkKeyFile, schedulers: Sequence[LinkKeyFile]) -> Finding:
    check = f"link keys in {file.path}"
    if file.fault:
        return problem(
            check,
            f"no service can use it: {file.fault}",
            "put it back, or make all anew by `sfllm keys links DIR --renew` and give each process its own",
        )
    if file.role == "scheduler":
        return ok(check, f"a scheduler's, for {len(file.gateways)} gateways and {len(file.workers)} workers")
    believed = [each for each in schedulers if each.public == file.scheduler]
    if schedulers and not believed:
        return problem(
            check,
            f"this {file.role} takes another scheduler for its own, and will not find it here",
            "give it a file of that scheduler's set: `sfllm keys links DIR --add` makes one",
        )
    lists = [each.gateways if file.role == "gateway" else each.workers for each in believed]
    if any(file.public not in peers for peers in lists):
        return problem(
            check,
            f"the scheduler does not let this {file.role} in: its public key is not in the scheduler's file",
            "make it a new one with `sfllm keys links DIR --add`",
        )
    return ok(check, f"a {file.role}'s" + (", whom the scheduler lets in" if believed else ""))
