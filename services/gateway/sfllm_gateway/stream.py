"""One submitted prompt and the journal of what came back: the machine that makes workers replaceable.

The gateway holds the prompt and every token of every choice. Whatever happens behind
it (a lost worker, a restarted scheduler, a gap), it submits again with the next attempt
number and the tokens so far, and whoever serves it goes on from there. Messages of
older attempts are ignored, tokens that are already in the journal are trimmed, and so
token `i` is journalled once and in order. Log probabilities of the prompt, where they were asked
for, come before the first token. No socket and no clock in here.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from sfllm.errors import ErrorCode, ServiceError
from sfllm.messages import ALL_CHOICES, Cancel, Finished, Interrupted, Message, Rejected, Sampling, Submit
from sfllm.token_batch import NO_LOGPROBS, Logprobs
from sfllm.wire import Array
from sfllm_gateway.journal import ChoiceJournal, PromptJournal


class Request(NamedTuple):
    """What to generate: one prompt, `n` choices. `prompt` holds token ids (array code "I")."""

    request_id: str
    model: str
    prompt: array[int]
    n: int
    sampling: Sampling
    priority: int = 0
    cache_salt: str = ""


class Outgoing(NamedTuple):
    """A message for the scheduler with its arrays."""

    message: Message
    arrays: tuple[Array, ...] = ()


class Stream:
    """The state of one request. Methods return what to send; `error` and the journals say the rest.

    `max_attempts` bounds how often workers may lose it; a restarted scheduler does not count.
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
        self.migrations = 0
        self._attempts_left = max_attempts - 1
        self._last_worker = ""

    @property
    def ended(self) -> bool:
        """Whether nothing more will come."""
        return self.error is not None or all(choice.finish_reason for choice in self.choices)

    def submit(self, milliseconds_left: int) -> Outgoing:
        """The submission of the current attempt; the same one again while it is not acknowledged."""
        open_choices = [index for index, choice in enumerate(self.choices) if choice.finish_reason is None]
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
        )
        return Outgoing(message, (memoryview(self.request.prompt), memoryview(so_far)))

    def on_admitted(self, attempt: int) -> None:
        """The scheduler has the current attempt."""
        if attempt == self.attempt and not self.ended:
            self._mark_admitted()

    def on_prompt_logprobs(self, attempt: int, start: int, found: Logprobs) -> bool:
        """Journal log probabilities of the prompt. False: they do not follow what is here: submit again."""
        if attempt != self.attempt or self.ended:
            return True
        self._mark_admitted()
        return self.prompt.add(start, found)

    def on_tokens(
        self, attempt: int, choice: int, start: int, ids: Sequence[int], logprobs: Logprobs = NO_LOGPROBS
    ) -> bool:
        """Journal new tokens. False: they do not follow what is here, so submit again."""
        if attempt != self.attempt or choice >= len(self.choices) or self.ended:
            return True
        journal = self.choices[choice]
        if journal.finish_reason is not None:
            return True
        self._mark_admitted()
        return self.prompt.complete and journal.add(start, ids, self.request.sampling.max_tokens, logprobs)

    def on_finished(self, message: Finished) -> bool:
        """A choice ended. False: not all of its tokens came, so submit again."""
        if message.attempt != self.attempt or not 0 <= message.choice < len(self.choices) or self.ended:
            return True
        journal = self.choices[message.choice]
        if journal.finish_reason is not None:
            return True
        missing = len(journal.ids) < message.generated_tokens or not self.prompt.complete
        if missing or message.reason not in {"stop", "length"}:
            return False
        self._mark_admitted()
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
        self.error = ServiceError(code, message.message, retry_after_seconds=message.retry_after_seconds)

    def on_interrupted(self, message: Interrupted) -> bool:
        """The attempt was lost with its worker. True: submit again."""
        if message.attempt != self.attempt or self.ended:
            return False
        self._last_worker = message.worker
        return True

    def next_attempt(self, counts: bool = True) -> bool:
        """Go on to the next attempt; True if it is to be submitted. `counts`: a worker lost the last one.

        A choice that has all its tokens needs no worker to say that it ended.
        """
        for choice in self.choices:
            if choice.finish_reason is None and len(choice.ids) >= self.request.sampling.max_tokens:
                choice.finish_reason = "length"
        if self.ended:
            return False
        if counts and self._attempts_left <= 0:
            self.error = ServiceError(ErrorCode.ENGINE_FAILURE, "the model's workers failed on this request")
            return False
        self._attempts_left -= counts
        self.attempt += 1
        self.admitted = False
        self.migrations += 1
        return True

    def stop_choice(self, choice: int, kept_tokens: int) -> Outgoing | None:
        """The text of a choice reached a stop string with its first `kept_tokens` tokens.

        Later tokens are dropped. Gives the cancel to send, None if the choice had ended by itself.
        """
        journal = self.choices[choice]
        was_open = journal.finish_reason is None
        journal.keep(kept_tokens)
        journal.finish_reason = "stop"
        journal.stop_token_id = -1
        if not was_open:
            return None
        return Outgoing(Cancel(self.handle, self.attempt, ALL_CHOICES if self.ended else choice, "stop"))

    def cancel(self, reason: str) -> Outgoing:
        """Ends the request on this side and everywhere behind it."""
        return Outgoing(Cancel(self.handle, self.attempt, ALL_CHOICES, reason))

    def _mark_admitted(self) -> None:
        self.admitted = True
        self.ever_admitted = True
