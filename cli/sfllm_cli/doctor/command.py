"""The command: settings in, findings out."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence

from sfllm.config import parse
from sfllm.version import VERSION
from sfllm_cli.doctor.api_checks import check_api
from sfllm_cli.doctor.evidence import Evidence
from sfllm_cli.doctor.findings import Finding, exit_code
from sfllm_cli.doctor.gather import gather
from sfllm_cli.doctor.gpu_checks import check_gpus
from sfllm_cli.doctor.key_checks import check_keys
from sfllm_cli.doctor.link_checks import check_links
from sfllm_cli.doctor.load_checks import check_load
from sfllm_cli.doctor.machine_checks import check_machine
from sfllm_cli.doctor.model_checks import check_fleet, check_models
from sfllm_cli.doctor.process_checks import (
    check_clocks,
    check_limits,
    check_processes,
    check_protocols,
    check_versions,
)
from sfllm_cli.doctor.report import show, write_json
from sfllm_cli.doctor_settings import DoctorSettings
from sfllm_cli.settings import known_settings


def run(argv: Sequence[str]) -> int:
    """Look at a stack and tell; 1 if there is a problem. Raises `CommandError`."""
    settings = parse(
        DoctorSettings,
        prog="sfllm doctor",
        description="Look at a running stack from the outside and say what to mend.",
        argv=argv,
        known=known_settings(),
    )
    findings = examine(asyncio.run(gather(settings)))
    # Standard output is for one of the two.
    show(findings, sys.stderr if settings.json == "-" else sys.stdout)
    if settings.json is not None:
        write_json(findings, settings.json)
    return exit_code(findings)


def examine(evidence: Evidence) -> list[Finding]:
    """All checks, in the order in which one would mend: what is missing first."""
    return [
        *check_api(evidence),
        *check_keys(evidence),
        *check_processes(evidence),
        *check_links(evidence),
        *check_fleet(evidence),
        *check_models(evidence),
        *check_versions(evidence, VERSION),
        *check_protocols(evidence),
        *check_clocks(evidence),
        *check_limits(evidence),
        *check_load(evidence),
        *check_machine(evidence),
        *check_gpus(evidence),
    ]
