"""`sfllm replay FILE`: give a scheduler's flight record to the scheduler's core again and compare decisions.

Its options are no settings: a variable or file that is meant for the scheduler must not change a replay.
"""

from __future__ import annotations

import argparse
import importlib.metadata
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from sfllm.messages import (
    SCHEDULER_TO_GATEWAY,
    SCHEDULER_TO_WORKER,
    Message,
)
from sfllm.wire import Array
from sfllm_cli.errors import CommandError
from sfllm_scheduler.core.cohorts import POLICIES
from sfllm_scheduler.core.core import SchedulerCore
from sfllm_scheduler.core.events import (
    Action,
    Event,
    FromGateway,
    FromWorker,
    Record,
    Tick,
    ToGateway,
    ToWorker,
)
from sfllm_scheduler.core.flight import (
    FULL,
    Entry,
    FlightRecord,
    RecordError,
    decision_code,
    digest,
    event_of,
)

READ_BYTES = 2**18
LINE_CHARACTERS = 400

_MESSAGE_NAMES = {cls.kind: cls.__name__ for cls in (*SCHEDULER_TO_GATEWAY, *SCHEDULER_TO_WORKER)}
_OTHER_NAMES = {200: "Record", 201: "NeedAssets", 202: "ForgetGateway", 203: "ForgetWorker"}
_NAMES = _MESSAGE_NAMES | _OTHER_NAMES


def run(argv: Sequence[str]) -> int:
    """Replay and report; 1 when a decision differs. Raises `CommandError` when the file is damaged."""
    options = _parser().parse_args(argv)
    try:
        with options.file.open("rb") as file:
            record = FlightRecord(iter(lambda: file.read(READ_BYTES), b""))
            return _Replay(record, options.policy, printing=options.print).run()
    except (RecordError, OSError) as error:
        raise CommandError(f"{options.file}: {error}") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sfllm replay",
        description="Run what a scheduler recorded (`--record FILE`) through its core again: the decisions "
        "must be the same, byte for byte.",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="the flight record")
    parser.add_argument("--print", action="store_true", help="show every event and what was decided")
    parser.add_argument(
        "--policy",
        choices=sorted(POLICIES),
        help="decide by another policy than the recorded one; nothing can be compared then",
    )
    return parser


class _Replay:
    """One run through a record, and what it counts."""

    def __init__(self, record: FlightRecord, policy: str | None, *, printing: bool) -> None:
        header = record.header
        values = header.policy if policy is None else msgspec.structs.replace(header.policy, policy=policy)
        self._record = record
        self._core = SchedulerCore(values, header.epoch)
        self._compares = values == header.policy
        self._prints = printing
        self._events = 0
        self._started = 0.0
        self._decisions: Counter[str] = Counter()
        print(
            f"recorded by sfllm {header.sfllm}, policy {header.policy.policy}, epoch {header.epoch}",
            flush=True,
        )
        own = importlib.metadata.version("sfllm")
        if own != header.sfllm:
            print(f"this is sfllm {own}, which may decide otherwise")
        if not self._compares:
            print(f"decided by policy {values.policy}: not to be compared with what was recorded")

    def run(self) -> int:
        """The exit code."""
        for entry in self._record.entries():
            if entry.kind == FULL:
                print("the record reached its bound here; what came later is not in it")
                break
            if not self._handle(entry):
                return 1
        if self._record.cut_off:
            print("the record ends in the middle of a block: its writer was killed")
        decisions = ", ".join(f"{count} {name}" for name, count in self._decisions.most_common()) or "none"
        print(f"{self._events} events, decisions: {decisions}")
        print("identical" if self._compares else "not compared")
        return 0

    def _handle(self, entry: Entry) -> bool:
        """Decide about one event; whether that is what was decided then."""
        event = event_of(entry)
        if not self._events:
            self._started = entry.time
        self._events += 1
        error = ""
        actions: list[Action] | None
        try:
            actions = self._core.handle(event, entry.time)
        except Exception as raised:  # noqa: BLE001 - whatever the core raised live it raises here
            actions, error = None, f"{type(raised).__name__}: {raised}"
        self._decisions.update(_name(action) for action in actions or ())
        if self._prints and (actions or actions is None or not isinstance(event, Tick)):
            print(f"{entry.time - self._started:+.6f} {_event_words(event)}")
            for line in _decided(actions, error):
                print(f"    {line}")
        codes = None if actions is None else bytes(map(decision_code, actions))
        if self._compares and (codes, digest(actions or ())) != (entry.decisions, entry.digest):
            self._tell_difference(entry, event, actions, error)
            return False
        return True

    def _tell_difference(self, entry: Entry, event: Event, actions: list[Action] | None, error: str) -> None:
        recorded = _names(entry.decisions)
        print(f"event {self._events} differs, at {entry.time - self._started:.6f} s: {_event_words(event)}")
        print(f"  recorded: {recorded} (digest {entry.digest.hex() or 'none'})")
        print(f"  replayed: digest {digest(actions or ()).hex() or 'none'}")
        for line in _decided(actions, error):
            print(f"    {line}")


def _names(codes: bytes | None) -> str:
    if codes is None:
        return "the core raised an exception"
    return ", ".join(_NAMES.get(code, f"kind {code}") for code in codes) or "no decision"


def _name(action: Action) -> str:
    return action.event if isinstance(action, Record) else _NAMES[decision_code(action)]


def _decided(actions: list[Action] | None, error: str) -> Iterator[str]:
    if actions is None:
        yield f"the core raised {error}"
    for action in actions or ():
        match action:
            case ToGateway() | ToWorker():
                yield _cut(f"to {_peer(action.peer)}: {_message(action.message, action.arrays)}")
            case Record():
                fields = " ".join(f"{name}={value}" for name, value in action.fields.items())
                yield _cut(f"record {action.event}: {fields}")
            case _:
                yield _cut(f"{_name(action)} {_peer(action.peer)}")


def _event_words(event: Event) -> str:
    match event:
        case FromGateway() | FromWorker():
            return _cut(f"from {_peer(event.peer)}: {_message(event.message, event.arrays)}")
        case Tick():
            return "tick"
        case _:
            return _cut(str(event))


def _message(message: Message, arrays: Sequence[Array]) -> str:
    lengths = ", ".join(str(len(array)) for array in arrays)
    return f"{message} arrays of {lengths}" if arrays else str(message)


def _peer(peer: bytes) -> str:
    return peer.decode("ascii", "backslashreplace")


def _cut(text: str) -> str:
    return text if len(text) <= LINE_CHARACTERS else f"{text[:LINE_CHARACTERS]}..."
