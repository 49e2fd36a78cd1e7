"""The catalogue of errors."""

from __future__ import annotations

import pytest

from sfllm.errors import ECHO_LIMIT_CHARACTERS, HTTP_ERRORS, ErrorCode, ServiceError, quote


def test_every_code_has_a_status_and_a_type() -> None:
    assert set(HTTP_ERRORS) == set(ErrorCode)
    for error in HTTP_ERRORS.values():
        assert 400 <= error.status < 600
        assert error.type.endswith("_error")


@pytest.mark.parametrize(
    ("code", "status"),
    [("queue_full", 429), ("service_unavailable", 503), ("deadline_exceeded", 504), ("model_not_found", 404)],
)
def test_a_code_becomes_its_status(code: str, status: int) -> None:
    error = ServiceError(ErrorCode(code), "a sentence", param="model", retry_after_seconds=2.0)
    assert error.http.status == status
    assert str(error) == error.message == "a sentence"


@pytest.mark.parametrize("text", ["x" * 10_000, "\x00" * 10_000, ["y"] * 10_000])
def test_quoted_input_is_cut(text: object) -> None:
    assert len(quote(text)) <= ECHO_LIMIT_CHARACTERS
    assert quote(text).endswith("...")


def test_short_input_is_quoted_whole() -> None:
    assert quote("gpt-5") == "'gpt-5'"
