"""The two files that a batch writes: answers and, apart from them, what failed."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NamedTuple, Self

from sfllm_cli.batch_files import BatchFileError, Recovered, Result, open_file, recover_results, result_line
from sfllm_cli.errors import CommandError


class Earlier(NamedTuple):
    """How many requests earlier runs have ended."""

    answered: int
    failed: int


class BatchOutput:
    """Appends results. A custom_id is in one of the files at most, and in neither before it has ended.

    `output` only ever grows. `errors` is made when something fails, and removed when
    that is tried again. Nobody else can open the same output meanwhile.
    """

    def __init__(self, output: Path, errors: Path, pending: set[str], *, retry_failed: bool) -> None:
        """Open `output`, and take out of `pending` what needs no request any more.

        Raises `BatchFileError`, before anything is changed, when the files do not belong to the input.
        """
        self._output_path, self._errors_path = output, errors
        self._errors: BinaryIO | None = None
        self._refused = ""
        try:
            self._output: BinaryIO = output.open("ab", buffering=0)
        except OSError as error:
            raise BatchFileError(f"cannot write {output}: {error.strerror}") from error
        try:
            self._lock()
            answered = _take_finished(output, pending)
            failed = _take_finished(errors, pending) if errors.exists() else None
            # Both files are known to be ours: only now may they change.
            os.truncate(output, answered.whole_bytes)
            if failed is not None and retry_failed:
                errors.unlink()
                pending.update(failed.custom_ids)
            elif failed is not None:
                os.truncate(errors, failed.whole_bytes)
        except BaseException:
            self._output.close()
            raise
        kept = 0 if failed is None or retry_failed else len(failed.custom_ids)
        self.earlier = Earlier(len(answered.custom_ids), kept)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.sync()
        finally:
            self._output.close()
            if self._errors is not None:
                self._errors.close()

    def add(self, value: Result) -> None:
        """Append a result to the file where it belongs. Raises `CommandError` when the disk refuses it.

        Then nothing is added any more: only a last line may be torn.
        """
        path = self._errors_path if value.failed else self._output_path
        if self._refused:
            raise CommandError(self._refused)
        try:
            if not value.failed:
                file = self._output
            elif self._errors is None:
                file = self._errors = self._errors_path.open("ab", buffering=0)
            else:
                file = self._errors
            left = memoryview(result_line(value))
            while left:
                left = left[file.write(left) :]
        except OSError as error:
            self._refused = f"cannot write {path}: {error.strerror}. Run the same command again to go on"
            raise CommandError(self._refused) from error

    def sync(self) -> None:
        """Wait until the disk has what was added, so that not even a power cut loses it.

        Raises `CommandError`.
        """
        for file, path in ((self._output, self._output_path), (self._errors, self._errors_path)):
            try:
                if file is not None:
                    os.fsync(file.fileno())
            except OSError as error:
                raise CommandError(f"cannot write {path}: {error.strerror}") from error

    def _lock(self) -> None:
        try:
            fcntl.flock(self._output, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BatchFileError(f"another `sfllm batch` is writing {self._output_path}") from error


def _take_finished(path: Path, pending: set[str]) -> Recovered:
    """Take the custom_ids of a file of results out of `pending`.

    Raises `BatchFileError` when one is not there.
    """
    with open_file(path) as file:
        found = recover_results(file, path)
    for number, custom_id in enumerate(found.custom_ids, 1):
        if custom_id not in pending:
            raise BatchFileError(
                f"{path}:{number} is about {custom_id[:100]!r}, which is not in the input or has a result "
                "already; another batch needs another output"
            )
        pending.remove(custom_id)
    return found
