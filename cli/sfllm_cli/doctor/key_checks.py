"""Files of keys: whether they can be used, by those alone whom they are for."""

from __future__ import annotations

from collections.abc import Iterator

from sfllm_cli.doctor.evidence import Evidence
from sfllm_cli.doctor.findings import Finding, ok, problem, warning
from sfllm_cli.doctor.key_files import ApiKeyFile

WRITABLE_BY_OTHERS = 0o022


def check_keys(evidence: Evidence) -> Iterator[Finding]:
    """The files that were named; nothing of those that were not."""
    if evidence.api_keys is not None:
        yield _api_keys(evidence.api_keys)


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
