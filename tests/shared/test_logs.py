"""Log lines of a process: readable, or one JSON object each."""

from __future__ import annotations

import json
import subprocess
import sys

PROGRAM = """
import logging, sys
import structlog
from sfllm import logs
logs.setup("svc", sys.argv[1], sys.argv[2])
log = structlog.get_logger()
log.debug("hidden")
log.info("request admitted", request_id="r-1", tokens=3)
logging.getLogger("uvicorn").warning("from %s", "elsewhere")
try:
    raise ValueError("boom")
except ValueError:
    log.exception("it failed", request_id="r-1")
"""


def output(level: str, log_format: str) -> str:
    command = [sys.executable, "-c", PROGRAM, level, log_format]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stderr


def test_json_lines_carry_the_service_the_level_and_the_request_id() -> None:
    first, second, third = (json.loads(line) for line in output("info", "json").splitlines())
    assert (first["event"], first["service"], first["level"]) == ("request admitted", "svc", "info")
    assert (first["request_id"], first["tokens"]) == ("r-1", 3)
    assert first["timestamp"].endswith("Z")
    assert (second["event"], second["level"], second["service"]) == ("from elsewhere", "warning", "svc")
    assert "ValueError: boom" in third["exception"]


def test_text_lines_are_for_people_and_keep_to_the_level() -> None:
    text = output("warning", "text")
    assert "request admitted" not in text
    assert "from elsewhere" in text
    assert "ValueError: boom" in text
    assert "hidden" in output("debug", "text")


def test_a_logged_exception_is_a_plain_traceback_without_local_variables() -> None:
    code = (
        "import structlog\n"
        "from sfllm import logs\n"
        "logs.setup('t')\n"
        "secret = 'hidden' * 2\n"
        "try:\n"
        "    1 / 0\n"
        "except ZeroDivisionError:\n"
        "    structlog.get_logger().exception('failed')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert "ZeroDivisionError: division by zero" in done.stderr
    assert "hiddenhidden" not in done.stderr
    assert len(done.stderr.splitlines()) < 10
