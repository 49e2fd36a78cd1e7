"""The lines of batch files, as OpenAI's batch API has them: requests in, answers and failures out.

No sockets and no clocks: what a line means, whether a whole file may be sent, and what a file of
answers that was cut off anywhere still holds.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Generator, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import msgspec

from sfllm_cli.errors import CommandError

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")
"""Where a line may be sent: what OpenAI's batch API takes. A server without one of them answers 404."""

MAX_LINE_BYTES = 64 * 2**20
SHOWN_PROBLEMS = 10

_RESULT_BEGINS = b'{"id":"batch_req_'


class BatchFileError(CommandError):
    """A file that cannot be used as it is: nothing was sent, and nothing was written."""


class BatchRequest(msgspec.Struct, frozen=True):
    """One line of the input. `body` is sent as it is written."""

    custom_id: str
    method: Literal["POST"]
    url: str
    body: msgspec.Raw


class Answer(msgspec.Struct, frozen=True):
    """What the server said to a request, whatever its status."""

    status_code: int
    request_id: str
    body: msgspec.Raw


class Failure(msgspec.Struct, frozen=True):
    """Why there is no answer to a request."""

    code: str
    message: str


class Result(msgspec.Struct, frozen=True):
    """One line of the output or, when it `failed`, of the file of errors."""

    id: str
    custom_id: str
    response: Answer | None
    error: Failure | None

    @property
    def failed(self) -> bool:
        """Whether this is no answer to use, so that the request may be tried again."""
        return self.response is None or self.response.status_code != 200


class _Finished(msgspec.Struct, frozen=True):
    """What is needed of a line that was written earlier; a line of requests has no `response`."""

    custom_id: str
    response: msgspec.Raw


class Recovered(NamedTuple):
    """A file of results: whose they are, and the bytes up to the end of its last whole line."""

    custom_ids: list[str]
    whole_bytes: int


_REQUESTS = msgspec.json.Decoder(BatchRequest)
_FINISHED = msgspec.json.Decoder(_Finished)
_ENCODER = msgspec.json.Encoder()


def result(custom_id: str, outcome: Answer | Failure) -> Result:
    """The result of a request under an id of its own."""
    answer, failure = (outcome, None) if isinstance(outcome, Answer) else (None, outcome)
    return Result(f"batch_req_{secrets.token_hex(12)}", custom_id, answer, failure)


def result_line(value: Result) -> bytes:
    """The line for `value`, with its newline."""
    return _ENCODER.encode(value) + b"\n"


def check_requests(path: Path) -> set[str]:
    """Every custom_id of a file that may be sent as a whole. Raises `BatchFileError` with its problems."""
    custom_ids: set[str] = set()
    problems: list[str] = []
    count = 0
    with open_file(path) as file:
        for number, line in _lines(file):
            problem = _problem(line, custom_ids)
            if problem:
                count += 1
                if count <= SHOWN_PROBLEMS:
                    problems.append(f"{path}:{number}: {problem}")
    if count > SHOWN_PROBLEMS:
        problems.append(f"and {count - SHOWN_PROBLEMS} more")
    if problems:
        raise BatchFileError("\n".join(["nothing was sent, because of", *problems]))
    if not custom_ids:
        raise BatchFileError(f"{path} has no requests")
    return custom_ids


def pending_requests(path: Path, pending: Collection[str]) -> Generator[BatchRequest, None, None]:
    """The requests of a checked file whose custom_id is in `pending`, in the order of the file.

    Lines are read as they are taken, so a file of any size needs the memory of one line. Raises
    `BatchFileError` when the file is no longer what was checked.
    """
    with open_file(path) as file:
        for number, line in _lines(file):
            try:
                request = _REQUESTS.decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise BatchFileError(f"{path}:{number} changed while it was sent: {error}") from error
            if request.custom_id in pending:
                yield request


def recover_results(file: BinaryIO, path: Path) -> Recovered:
    """What a file of results holds. A last line without its end was cut off, and is not counted.

    Raises `BatchFileError` for whatever this command did not write, which must not be added to.
    """
    custom_ids = []
    whole_bytes = 0
    for number, line in _lines(file, strip=False):
        if not line.endswith(b"\n"):
            if not (line.startswith(_RESULT_BEGINS) or _RESULT_BEGINS.startswith(line)):
                raise BatchFileError(f"{path}:{number} is no result of a batch; is it the right file?")
            break
        try:
            custom_ids.append(_FINISHED.decode(line).custom_id)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise BatchFileError(f"{path}:{number} is no result of a batch: {error}") from error
        whole_bytes += len(line)
    return Recovered(custom_ids, whole_bytes)


def with_model(body: msgspec.Raw, model: str) -> bytes:
    """`body` with its model replaced and every other byte of its values as it was."""
    fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    fields["model"] = msgspec.Raw(_ENCODER.encode(model))
    return _ENCODER.encode(fields)


def open_file(path: Path) -> BinaryIO:
    """The file, to be read from its beginning. Raises `BatchFileError`."""
    try:
        return path.open("rb")
    except OSError as error:
        raise BatchFileError(f"cannot read {path}: {error.strerror}") from error


def _problem(line: bytes, custom_ids: set[str]) -> str:
    """What is wrong with a line of requests; otherwise takes its custom_id, and is empty."""
    try:
        request = _REQUESTS.decode(line)
        # Raw values are only skipped over above; a damaged one would be refused by the server.
        body: Any = msgspec.json.decode(request.body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        return str(error)
    if request.url not in URLS:
        return f"url is {request.url[:100]!r}, not one of {', '.join(URLS)}"
    if not isinstance(body, dict):
        return "body is not an object"
    if body.get("stream"):
        return "stream cannot be used in a batch"
    if request.custom_id in custom_ids:
        return f"custom_id {request.custom_id[:100]!r} is that of an earlier line"
    custom_ids.add(request.custom_id)
    return ""


def _lines(file: BinaryIO, *, strip: bool = True) -> Iterator[tuple[int, bytes]]:
    """Numbers from 1 and lines; without blank ones and newlines if `strip`."""
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            raise BatchFileError(f"{file.name}:{number} is longer than {MAX_LINE_BYTES} bytes")
        if not strip:
            yield number, line
        elif stripped := line.strip():
            yield number, stripped
