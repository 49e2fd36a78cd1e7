"""One submitted prompt and the journal of what came back: the machine that makes workers replaceable.

The gateway holds the prompt and every token of every choice. Whatever happens behind
it (a lost worker, a restarted scheduler, tokens that never came), it submits again with
the next attempt number and the tokens so far, and whoever serves it goes on from there.
Messages of older attempts are ignored, tokens that are already in the journal are trimmed,
and so token `i` is journalled once and in order. Log probabilities of the prompt, where they were
asked for, come before the first token. No socket and no clock in here.
"""

from __future__ import annotations

import enum
from array import array
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from sfllm.errors import ErrorCode, ServiceError
from sfllm.messages import (
    ALL_CHOICES,
    PROBATION_TOKENS,
    Cancel,
    Finished,
    Interrupted,
    Message,
    Rejected,
    Resend,
    Sampling,
    Submit,
)
from sfllm.prefixes import prefix_names
from sfllm.token_batch import NO_LOGPROBS, Logprobs
from sfllm.wire import Array
from sfllm_gateway.journal import ChoiceJournal, PromptJournal

RESEND_SECONDS = 2.0
"""Tokens that were asked for again and do not come in this time are made anew by the next attempt."""


class Request(NamedTuple):
    """What to generate: one prompt, `n` choices. `prompt` holds token ids (array code "I").

    `tenant` names who asks, and `traceparent` where spans belong, as `Submit` does.
    """

    request_id: str
    model: str
    prompt: array[int]
    n: int
    sampling: Sampling
    priority: int = 0
    cache_salt: str = ""
    tenant: str = ""
    traceparent: str = ""


class Outgoing(NamedTuple):
    """A message for the scheduler with its arrays."""

    message: Message
    arrays: tuple[Array, ...] = ()


class Gap(enum.Enum):
    """What to do about tokens that do not follow those that are here."""

    NONE = enum.auto()
    ASK = enum.auto()
    """Ask for them again: see `Stream.resend`."""
    RESTART = enum.auto()
    """End this attempt and begin the next: see `Stream.restart`."""


class Stream:
    """The state of one request. Methods return what to send; `error` and the journals say the rest.

    `max_attempts` bounds how often the request may be on a worker that crashes, or miss tokens; being
    moved for any other reason does not count.
    """

    def __init__(self, handle: int, request: Request, max_attempts: int) -> None:
        self.handle = handle
        self.request = request
        width = request.sampling.logprobs + 1
        self.choices = [ChoiceJournal(width) for _ in range(request.n)]
        self.prompt = PromptJournal(len(request.prompt), request.sampling.prompt_logprobs + 1)
        self.attempt = 0
        self.admitted = False
        self.ever_admitted = False
        self.error: ServiceError | None = None
        self.last_finished: Finished | None = None
        self.embedding: tuple[float, ...] = ()
        self.migrations = 0
        # 0.3 ms at most, and a thread could not help: hashing so little at once holds the interpreter's lock.
        self._prefixes = prefix_names(memoryview(request.prompt), request.cache_salt)
        self._attempts_left = max_attempts - 1
        self._last_worker = ""
        self._suspects = 0
        self._crashes_alone = 0
        self._lengths_before = [0] * request.n
        self._asked_at: dict[int, float] = {}

    @property
    def open_choices(self) -> list[int]:
        """The choices of which more may come."""
        if self.error is not None:
            return []
        return [index for index, choice in enumerate(self.choices) if choice.finish_reason is None]

    @property
    def ended(self) -> bool:
        """Whether nothing more will come."""
        return self.error is not None or all(choice.finish_reason for choice in self.choices)

    @property
    def attempt_has_output(self) -> bool:
        """Whether any token of the current attempt has come."""
        pairs = zip(self.choices, self._lengths_before, strict=True)
        return any(len(choice.ids) > before for choice, before in pairs)

    # what to send

    def submit(self, milliseconds_left: int, age_milliseconds: int = 0) -> Outgoing:
        """The submission of the current attempt; the same one again while it is not acknowledged."""
        open_choices = self.open_choices
        so_far: array[int] = array("I")
        for index in open_choices:
            so_far += self.choices[index].ids
        sampling = self.request.sampling
        if self.prompt.complete and sampling.prompt_logprobs >= 0:
            sampling = msgspec.structs.replace(sampling, prompt_logprobs=-1)
        message = Submit(
            request_id=self.request.request_id,
            handle=self.handle,
            attempt=self.attempt,
            model=self.request.model,
            choices=tuple(open_choices),
            generated_counts=tuple(len(self.choices[index].ids) for index in open_choices),
            sampling=sampling,
            priority=self.request.priority,
            milliseconds_left=max(milliseconds_left, 1),
            last_worker=self._last_worker,
            cache_salt=self.request.cache_salt,
            age_milliseconds=age_milliseconds,
            suspects=self._suspects,
            crashes_alone=self._crashes_alone,
            tenant=self.request.tenant,
            traceparent=self.request.traceparent,
        )
        return Outgoing(message, (memoryview(self.request.prompt), memoryview(so_far), self._prefixes))

    def cancel(self, reason: str) -> Outgoing:
        """Ends the request on this side and everywhere behind it."""
        return Outgoing(Cancel(self.handle, self.attempt, ALL_CHOICES, reason))

    def resend(self, choice: int, now: float) -> Outgoing:
        """Asks for the tokens of a choice that should have come by now (`now` in seconds)."""
        self._asked_at[choice] = now
        return Outgoing(Resend(self.handle, self.attempt, choice, len(self.choices[choice].ids)))

    def resend_failed(self, now: float) -> bool:
        """Whether tokens that were asked for again did not come in `RESEND_SECONDS`."""
        return any(now - asked_at >= RESEND_SECONDS for asked_at in self._asked_at.values())

    # what came

    def on_admitted(self, attempt: int) -> None:
        """The scheduler has the current attempt."""
        if attempt == self.attempt and not self.ended:
            self._mark_admitted()

    def on_prompt_logprobs(self, attempt: int, start: int, found: Logprobs) -> bool:
        """Journal log probabilities of the prompt. False: they do not follow what is here: restart."""
        if attempt != self.attempt or self.ended:
            return True
        self._mark_admitted()
        return self.prompt.add(start, found)

    def on_tokens(
        self, attempt: int, choice: int, start: int, ids: Sequence[int], logprobs: Logprobs = NO_LOGPROBS
    ) -> Gap:
        """Journal new tokens, or say what to do because they do not follow what is here."""
        if attempt != self.attempt or choice >= len(self.choices) or self.error is not None:
            return Gap.NONE
        journal = self.choices[choice]
        if journal.finish_reason is not None:
            return Gap.NONE
        self._mark_admitted()
        known = len(journal.ids)
        if self.prompt.complete and journal.add(start, ids, self.request.sampling.max_tokens, logprobs):
            if len(journal.ids) > known:
                self._asked_at.pop(choice, None)
            return Gap.NONE
        if not self.prompt.complete or self.request.sampling.logprobs >= 0:
            return Gap.RESTART  # workers keep the tokens that they sent, and no log probabilities
        return Gap.NONE if choice in self._asked_at else Gap.ASK

    def on_finished(self, message: Finished, embedding: Sequence[float] = ()) -> bool:
        """A choice ended. False: not all of its tokens, or no embedding, came: restart."""
        if message.attempt != self.attempt or not 0 <= message.choice < len(self.choices) or self.ended:
            return True
        journal = self.choices[message.choice]
        if journal.finish_reason is not None:
            return True
        missing = len(journal.ids) < message.generated_tokens or not self.prompt.complete
        missing = missing or (bool(self.request.sampling.pooling) and not len(embedding))
        if missing or message.reason not in {"stop", "length"}:
            return False
        self._mark_admitted()
        self._asked_at.pop(message.choice, None)
        self.embedding = tuple(embedding)
        journal.finish_reason = message.reason
        journal.stop_token_id = message.stop_token_id
        self.last_finished = message
        return True

    def on_rejected(self, message: Rejected) -> None:
        """The scheduler or a worker gave the request up."""
        if message.attempt != self.attempt or self.ended:
            return
        try:
            code = ErrorCode(message.code)
        except ValueError:  # of a newer scheduler
            code = ErrorCode.ENGINE_FAILURE
        text = message.message
        if code is ErrorCode.ENGINE_FAILURE and self.request.request_id not in text:
            text = f"{text} (request {self.request.request_id})"  # by which it is found in the logs
        self.error = ServiceError(code, text, retry_after_seconds=message.retry_after_seconds)

    def on_interrupted(self, message: Interrupted) -> bool:
        """The attempt was lost. True: the next one is to be submitted."""
        if message.attempt != self.attempt or self.ended:
            return False
        self._last_worker = message.worker or self._last_worker
        self._clear_suspicion()
        self._suspects = message.suspects
        self._crashes_alone += message.suspects == 1
        return self._next_attempt(counts=message.suspects > 0)

    def restart(self, counts: bool) -> bool:
        """Give the attempt up on this side. True: the next one is to be submitted."""
        if self.ended:
            return False
        self._clear_suspicion()
        return self._next_attempt(counts)

    def on_deadline(self) -> None:
        """The time of the request is over."""
        if not self.ended:
            self.error = ServiceError(
                ErrorCode.DEADLINE_EXCEEDED, "the request took longer than its deadline"
            )

    def stop_choice(self, choice: int, kept_tokens: int) -> Outgoing | None:
        """The text of a choice reached a stop string with its first `kept_tokens` tokens.

        Later tokens are dropped. Gives the cancel to send, None if nothing of the choice runs any more.
        """
        journal = self.choices[choice]
        was_open = journal.finish_reason is None and self.error is None
        journal.keep(kept_tokens)
        journal.finish_reason = "stop"
        journal.stop_token_id = -1
        self._asked_at.pop(choice, None)
        if not was_open:
            return None
        return Outgoing(Cancel(self.handle, self.attempt, ALL_CHOICES if self.ended else choice, "stop"))

    def _next_attempt(self, counts: bool) -> bool:
        """Go on to the next attempt; True if it is to be submitted. `counts` takes from `max_attempts`.

        A choice that has all its tokens needs no worker to say that it ended.
        """
        for choice in self.choices:
            if choice.finish_reason is None and len(choice.ids) >= self.request.sampling.max_tokens:
                choice.finish_reason = "length"
        if self.ended:
            return False
        if counts and self._attempts_left <= 0:
            self.error = ServiceError(
                ErrorCode.ENGINE_FAILURE, f"the model's workers failed on request {self.request.request_id}"
            )
            return False
        self._attempts_left -= counts
        self.attempt += 1
        self.admitted = False
        self.migrations += 1
        self._asked_at.clear()
        self._lengths_before = [len(choice.ids) for choice in self.choices]
        return True

    def _clear_suspicion(self) -> None:
        """An attempt that came far enough computed whatever an earlier worker may have crashed of."""
        grown = zip(self.choices, self._lengths_before, strict=True)
        if any(len(choice.ids) - before >= PROBATION_TOKENS for choice, before in grown):
            self._suspects = self._crashes_alone = 0

    def _mark_admitted(self) -> None:
        self.admitted = True
        self.ever_admitted = True
