"""What the three kinds of process have in common: a clock of their own, an inbox, and ways to stop."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from sfllm import wire
from sfllm.messages import Message

from .agenda import Agenda

Do = Callable[[], None]


class InvariantBroken(AssertionError):  # noqa: N818 - it names what happened, as in a report
    """Something that must never be the case is. `kind` names the invariant, in a word or two."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(f"{kind}: {text}")
        self.kind = kind


def require(condition: object, kind: str, text: str) -> None:
    """Raise InvariantBroken unless the condition holds."""
    if not condition:
        raise InvariantBroken(kind, text)


def encoded(message: Message, arrays: Sequence[wire.Array] = ()) -> bytes:
    """A message as it is on the wire: a copy that nobody can change any more."""
    return wire.encode(message, *arrays)


class Process:
    """One run of a program, from its start to its end.

    What reaches it goes through `do`: it happens now, or, while the process stands still (or is busy), later
    and in order, or never when it is dead. `clock` is its monotonic clock, which starts anywhere.
    """

    def __init__(self, agenda: Agenda, name: str, clock_offset: float) -> None:
        self.agenda = agenda
        self.name = name
        self.alive = True
        self.still = False
        self._clock_offset = clock_offset
        self._inbox: deque[Do] = deque()

    @property
    def clock(self) -> float:
        """Seconds on its own clock."""
        return self.agenda.now + self._clock_offset

    def on_clock(self, time: float) -> float:
        """A time of the simulation on its own clock."""
        return time + self._clock_offset

    @property
    def busy(self) -> bool:
        """Whether what reaches it has to wait."""
        return self.still

    def do(self, what: Do) -> None:
        """Let the process do this as soon as it can."""
        if not self.alive:
            return
        self._inbox.append(what)
        self.work_off()

    def work_off(self) -> None:
        """Do what waits."""
        did = False
        while self._inbox and self.alive and not self.busy:
            self._inbox.popleft()()
            did = True
        if did and self.alive:
            self.after_work()

    def after_work(self) -> None:
        """Called when the inbox is empty after something was done."""

    def every(self, seconds: float, what: Do) -> None:
        """Do this again and again while the process lives; beats that a standstill missed are not made up."""

        def again() -> None:
            if self.alive:
                if not self.still:
                    what()
                self.agenda.after(seconds, again)

        self.agenda.after(0.0, again)

    def stand_still(self) -> None:
        """SIGSTOP."""
        self.still = True

    def go_on(self) -> None:
        """SIGCONT."""
        self.still = False
        self.work_off()

    def die(self) -> None:
        """SIGKILL."""
        self.alive = False
        self._inbox.clear()
