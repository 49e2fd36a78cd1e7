"""A modelled engine in virtual time: one step, or run of equal steps, is under way."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable

from sfllm_cli.simulate.agenda import Agenda
from sfllm_cli.simulate.engine import ModelledEngine
from sfllm_cli.simulate.work import Plan, Work


class Stepping:
    """Runs the steps of an engine for as long as there is something to do.

    `on_step(rows, seconds, steps)` hears of every decode step, for the times between tokens; `completed(plan,
    first, finished)` of what steps brought: who has got a first token, and who its last. `between` is called
    while no step is under way, before the next is planned.
    """

    def __init__(
        self,
        agenda: Agenda,
        engine: ModelledEngine,
        on_step: Callable[[int, float, int], None],
        completed: Callable[[Plan, list[Work], list[Work]], None],
        between: Callable[[], None],
    ) -> None:
        self._agenda = agenda
        self._engine = engine
        self._on_step = on_step
        self._completed = completed
        self._between = between
        self._plan: Plan | None = None
        self._began = 0.0
        self._steps = 0
        self._run = 0

    @property
    def is_stepping(self) -> bool:
        """Whether a step is under way."""
        return self._plan is not None

    def go_on(self) -> None:
        """Begin a step, or end a run of steps early so that what came is seen after the present one."""
        if self._plan is None:
            self._begin()
        elif self._steps > 1:
            steps = self._steps_by(self._agenda.now)
            if steps < self._steps:
                self._steps = steps
                self._run += 1
                end = self._began + self._engine.seconds(self._plan.rows, steps)
                self._agenda.at(max(end, self._agenda.now), self._end, self._run)

    def stop(self) -> None:
        """What the run under way has done so far counts, and its step that has not ended does not."""
        plan = self._plan
        if plan is not None and not plan.chunks:
            done = self._steps_by(self._agenda.now) - 1
            if done > 0:
                seconds = self._engine.seconds(plan.rows, done)
                self._complete(plan, done, seconds)
        self._plan = None
        self._run += 1

    def _begin(self) -> None:
        self._plan = self._engine.plan()
        if self._plan is not None:
            self._began, self._steps = self._agenda.now, self._plan.steps
            for work in self._plan.admitted:
                work.admitted_at = work.admitted_at or self._began
            self._run += 1
            self._agenda.after(self._plan.seconds, self._end, self._run)

    def _end(self, run: int) -> None:
        if run != self._run or self._plan is None:
            return
        plan, self._plan = self._plan, None
        self._complete(plan, self._steps, self._agenda.now - self._began)
        self._between()
        self._begin()

    def _steps_by(self, now: float) -> int:
        """The step that is under way at `now`, and all before it."""
        assert self._plan is not None
        rows, elapsed = self._plan.rows, now - self._began
        return 1 + bisect_left(
            range(1, self._steps), elapsed, key=lambda steps: self._engine.seconds(rows, steps)
        )

    def _complete(self, plan: Plan, steps: int, seconds: float) -> None:
        if plan.rows:
            self._on_step(plan.rows, seconds / steps, steps)
        first, finished = self._engine.complete(plan, steps)
        self._completed(plan, first, finished)
