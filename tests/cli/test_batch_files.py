"""What lines of batch files mean, which files may be sent, and what is left of a file cut off anywhere."""

from __future__ import annotations

import io
import json
from email.utils import formatdate
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from sfllm_cli import batch_files
from sfllm_cli.batch import positional_files
from sfllm_cli.batch_files import (
    Answer,
    BatchFileError,
    Failure,
    check_requests,
    pending_requests,
    recover_results,
    result,
    result_line,
    with_model,
)
from sfllm_cli.batch_output import BatchOutput
from sfllm_cli.batch_progress import BatchProgress, Tally
from sfllm_cli.batch_sending import LONGEST_WAIT_SECONDS, retry_after_seconds, wait_seconds
from sfllm_cli.errors import CommandError

CHAT = "/v1/chat/completions"


def line(custom_id: str, /, **changes: object) -> str:
    whole = {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": {"messages": []}, **changes}
    return json.dumps({name: value for name, value in whole.items() if value is not None}) + "\n"


def written(path: Path, *lines: str) -> Path:
    path.write_text("".join(lines), encoding="utf-8")
    return path


def test_a_good_file_gives_its_custom_ids_and_its_requests_in_order(tmp_path: Path) -> None:
    body = {"messages": [], "stream": False, "seed": 12345678901234567890}
    source = written(tmp_path / "in", line("b"), "\n", line("a", body=body), line("ü", extra=1).rstrip("\n"))
    assert check_requests(source) == {"a", "b", "ü"}
    left = list(pending_requests(source, {"a", "ü"}))
    assert [request.custom_id for request in left] == ["a", "ü"]
    assert bytes(left[0].body) == json.dumps(body).encode()


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        ("{\n", "truncated"),
        ("[]\n", "Expected `object`"),
        (line("x", custom_id=None), "missing required field `custom_id`"),
        (line("x", custom_id=7), "Expected `str`"),
        (line("x", method="GET"), "Invalid enum value 'GET'"),
        (line("x", url="/v1/files"), "url is '/v1/files', not one of /v1/chat/completions"),
        (line("x", body=None), "missing required field `body`"),
        (line("x", body=[]), "body is not an object"),
        (line("x", body={"stream": True}), "stream cannot be used"),
        (line("good"), "custom_id 'good' is that of an earlier line"),
    ],
)
def test_a_bad_line_is_told_with_its_number(bad: str, problem: str, tmp_path: Path) -> None:
    source = written(tmp_path / "in", line("good"), "\n", bad, line("more"))
    with pytest.raises(BatchFileError) as told:
        check_requests(source)
    assert f"{source}:3: " in str(told.value)
    assert problem in str(told.value)


def test_bytes_that_are_no_utf8_are_told_with_their_line(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.write_bytes(line("a").encode() + line("b", body={"prompt": "!"}).encode().replace(b"!", b"\xff"))
    with pytest.raises(BatchFileError, match=r":2: .*utf-8"):
        check_requests(source)


def test_many_bad_lines_are_counted_and_not_all_shown(tmp_path: Path) -> None:
    with pytest.raises(BatchFileError, match="and 15 more") as told:
        check_requests(written(tmp_path / "in", *["{}\n"] * 25))
    assert str(told.value).count("\n") == 11


def test_files_that_are_empty_missing_or_have_endless_lines_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BatchFileError, match="has no requests"):
        check_requests(written(tmp_path / "empty", "\n"))
    with pytest.raises(BatchFileError, match="No such file"):
        check_requests(tmp_path / "nowhere")
    monkeypatch.setattr(batch_files, "MAX_LINE_BYTES", 100)
    with pytest.raises(BatchFileError, match="longer than 100 bytes"):
        check_requests(written(tmp_path / "long", line("a" * 100)))


@given(
    st.lists(st.tuples(st.text(st.characters(codec="utf-8")), st.booleans()), min_size=1, max_size=5),
    st.data(),
)
def test_a_file_of_results_cut_off_anywhere_keeps_its_whole_lines(
    ends: list[tuple[str, bool]], data: st.DataObject
) -> None:
    answer, failure = Answer(200, "r", msgspec.Raw(b'{"id": 1}')), Failure("timeout", "too long")
    lines = [result_line(result(custom_id, answer if good else failure)) for custom_id, good in ends]
    whole = b"".join(lines)
    cut = data.draw(st.integers(0, len(whole)))
    found = recover_results(io.BytesIO(whole[:cut]), Path("out"))
    assert whole[: found.whole_bytes] == b"".join(lines[: len(found.custom_ids)])
    assert found.custom_ids == [custom_id for custom_id, _ in ends[: len(found.custom_ids)]]
    assert cut - found.whole_bytes < len(lines[min(len(found.custom_ids), len(lines) - 1)])


@pytest.mark.parametrize("content", [b"notes of mine", b"a,b\n", line("a").encode(), b'{"id":"other"'])
def test_a_file_that_this_command_did_not_write_is_not_taken_for_results(content: bytes) -> None:
    with pytest.raises(BatchFileError, match="out:1 is no result of a batch"):
        recover_results(io.BytesIO(content), Path("out"))


def test_a_result_is_written_as_openai_writes_it() -> None:
    answered = json.loads(result_line(result("a", Answer(200, "r1", msgspec.Raw(b'{"x":1.50}')))))
    assert answered.pop("id").startswith("batch_req_")
    assert answered == {
        "custom_id": "a",
        "response": {"status_code": 200, "request_id": "r1", "body": {"x": 1.5}},
        "error": None,
    }
    failed = json.loads(result_line(result("a", Failure("timeout", "too long"))))
    assert (failed["response"], failed["error"]) == (None, {"code": "timeout", "message": "too long"})


def test_another_model_replaces_the_one_of_a_line_and_nothing_else() -> None:
    body = msgspec.Raw(b'{"model": "gpt", "x": 1.000000000000000000001, "deep": {"model": "y"}}')
    assert with_model(body, "tiny") == b'{"model":"tiny","x":1.000000000000000000001,"deep":{"model": "y"}}'
    assert with_model(msgspec.Raw(b"{}"), "tiny") == b'{"model":"tiny"}'


@given(st.integers(0, 1000), st.floats(0, 1e6), st.floats(0, 1))
def test_waits_grow_within_bounds_and_are_not_shorter_than_asked(
    retry: int, retry_after: float, chance: float
) -> None:
    wait = wait_seconds(retry, retry_after, chance)
    assert min(retry_after, LONGEST_WAIT_SECONDS) <= wait <= LONGEST_WAIT_SECONDS
    assert wait >= 0.25
    assert wait_seconds(retry, 0.0, chance) <= wait_seconds(retry + 1, 0.0, chance) <= 30


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("3", 3),
        (" 0 ", 0),
        (formatdate(1010, usegmt=True), 10),
        (formatdate(990, usegmt=True), 0),
        ("soon", 0),
        ("", 0),
    ],
)
def test_retry_after_is_understood_as_seconds_or_a_date(header: str, seconds: float) -> None:
    assert retry_after_seconds(header, 1000.0) == seconds


def test_the_two_files_may_stand_anywhere_among_the_flags() -> None:
    meant = ["--url", "u", "--input", "in", "--no-retry-failed", "--output", "out", "--model=m"]
    assert positional_files(["--url", "u", "in", "--no-retry-failed", "out", "--model=m"]) == meant
    assert positional_files(["in", "out", "more"]) == ["--input", "in", "--output", "out", "more"]


def shown(*, terminal: bool) -> str:
    """What is told of a batch of four, ten seconds apart each."""
    text = io.StringIO()
    tally = Tally(4, 0, 0, started=100.0)
    with BatchProgress(Console(file=text, force_terminal=terminal, width=120), tally) as progress:
        for index in range(4):
            tally.add(result(str(index), Answer(200, "", msgspec.Raw(b'{"usage":{"output_tokens":60}}'))))
            progress.show(110.0 + index * 10)
    return text.getvalue()


def test_progress_is_a_line_now_and_then_unless_somebody_watches() -> None:
    assert shown(terminal=False) == "3 of 4 ended, 0 failed, 0.1 requests/s, 6 output tokens/s\n"
    assert "4/4" in shown(terminal=True)


def test_use_is_counted_whatever_the_answer_looks_like() -> None:
    tally = Tally(5, 0, 0, started=0.0)
    for body in (
        b'{"usage":{"prompt_tokens":1,"completion_tokens":2}}',
        b'{"usage":{"input_tokens":10,"output_tokens":20}}',
        b'{"usage":null}',
        b"[]",
    ):
        tally.add(result("x", Answer(200, "", msgspec.Raw(body))))
    tally.add(result("x", Answer(500, "", msgspec.Raw(b'{"usage":{"prompt_tokens":100}}'))))
    assert (tally.answered, tally.failed, tally.prompt_tokens, tally.output_tokens) == (4, 1, 11, 22)


def test_after_a_write_that_failed_nothing_follows_what_may_be_half_a_line(tmp_path: Path) -> None:
    answer = result("a", Answer(200, "", msgspec.Raw(b"{}")))
    with BatchOutput(tmp_path / "out", tmp_path / "no" / "errors", {"a", "b"}, retry_failed=True) as output:
        with pytest.raises(CommandError, match="errors: No such file"):
            output.add(result("b", Failure("timeout", "too long")))
        with pytest.raises(CommandError, match="errors: No such file"):
            output.add(answer)
    assert (tmp_path / "out").read_bytes() == b""
