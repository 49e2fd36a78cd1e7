"""Which of several schedulers a modelled worker belongs to: the live worker's rule, asked in virtual time."""

from __future__ import annotations

from typing import Protocol

from sfllm.scheduler_choice import SchedulerChoice
from sfllm_cli.simulate.agenda import Agenda
from sfllm_cli.simulate.schedulers import Schedulers

LOOK_SECONDS = 0.25
"""How often a worker looks after its schedulers. A live one does in every turn of its loop."""


class Member(Protocol):
    """The worker whose membership it is."""

    alive: bool

    @property
    def joined(self) -> bool:
        """Whether it has a lease."""

    @property
    def draining(self) -> bool:
        """Whether it takes nothing new."""

    def hello(self) -> None:
        """Ask the current scheduler for a lease."""

    def begin_move(self) -> None:
        """Drain, and then `move`."""


class Membership:
    """`current` is the scheduler that its worker says hello to, or belongs to.

    Where there is only one, nothing is asked and nothing can change.
    """

    def __init__(self, agenda: Agenda, worker_id: str, schedulers: Schedulers, member: Member) -> None:
        self._agenda = agenda
        self._schedulers = schedulers
        self._member = member
        self._choice = SchedulerChoice(worker_id, schedulers.addresses, agenda.now)
        self._unanswered: set[int] = set()

    @property
    def current(self) -> int:
        """The number of the scheduler."""
        return self._choice.current

    def start(self) -> None:
        """Look after the schedulers from now on."""
        if len(self._schedulers.addresses) > 1:
            self._agenda.after(LOOK_SECONDS, self._look)

    def move(self) -> None:
        """The worker has parted with its scheduler: say hello to the better one, if that is still there."""
        better = self._choice.better()
        self._choice.take(self.current if better is None else better, self._agenda.now)
        self._member.hello()

    def came_back(self, index: int) -> None:
        """A scheduler runs again, and finds the questions and the hello that waited for its connection."""
        if index in self._unanswered:
            self._unanswered.discard(index)
            self._answer(index)
        if index == self.current and not self._member.joined:
            self._member.hello()

    def _look(self) -> None:
        if not self._member.alive:
            return
        choice, now = self._choice, self._agenda.now
        for index in choice.to_probe(now):
            self._answer(index)
        before = choice.current
        choice.see(self._member.joined, now)
        if choice.current != before:
            self._member.hello()
        elif self._member.joined and not self._member.draining and choice.better() is not None:
            self._member.begin_move()
        self._agenda.after(LOOK_SECONDS, self._look)

    def _answer(self, index: int) -> None:
        """The answer to a question of now comes after the way there and back."""
        epoch = self._schedulers.epoch_of(index)
        if epoch is None:
            self._unanswered.add(index)
        else:
            self._agenda.after(2 * self._schedulers.link_seconds, self._answered, index, epoch)

    def _answered(self, index: int, epoch: int) -> None:
        self._choice.answered(index, epoch, self._agenda.now)
