"""One request as the scheduler sees it: lengths, urgency and where it is. No text, no tensors."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from math import inf
from operator import xor
from typing import NamedTuple

import msgspec

from sfllm.bands import band_of
from sfllm.holdings import OpenChoice, fingerprint
from sfllm.messages import Submit
from sfllm.wire import Array, as_array


class OutputLength(NamedTuple):
    """What is expected of the output of a choice, in tokens: its mean, and how much cache to set aside."""

    mean: float
    reserve: int


UNKNOWN_OUTPUT = OutputLength(128.0, 256)
"""Expected before anything is known. Reserving all of `max_tokens` would leave most of the cache unused,
since few requests use their whole allowance."""


class Key(NamedTuple):
    """Names a request in the whole system: the gateway's routing id and the gateway's number."""

    gateway: bytes
    handle: int


class Rank(NamedTuple):
    """A place in the order of arrival; `sequence` makes it unique. A retry keeps its first rank."""

    arrival: float
    sequence: int


class Request:
    """A live request: it waits (`worker` is None, the arrays are here) or runs (they are gone).

    `tokens` counts what must be prefilled: the prompt and the tokens of earlier attempts. `uncached` is
    what of that the best worker of its model did not have in its cache when it came; `band` is the
    length band of that, `prompt_band` that of its prompt and `size_band` that of its longest choice then.
    `longest` is the context of its longest choice, `slots` how many sequences it takes on a worker, and
    `kv_tokens` how much cache to set aside for it. `names` has its prefixes as numbers.
    `output` is what is expected of each choice, `latest_start` when it must go to a worker to be ready in
    time, and `charged` what its tenant has been charged for it. From `late_at` on its first token will be
    later than wished for, and it is `late`.
    `submitted` is when this attempt came, `rank` when the first one did. Times are in seconds.
    `open` has the fingerprint of each choice that has not ended, and `mark` is all of them in a digest;
    `closed` says how many lists the gateway had been asked for when a choice ended, and `asked` when the
    request was admitted.
    """

    __slots__ = (
        "asked",
        "band",
        "charged",
        "closed",
        "generated",
        "is_retry",
        "key",
        "kv_tokens",
        "late",
        "late_at",
        "latest_start",
        "longest",
        "mark",
        "model",
        "names",
        "open",
        "output",
        "prefixes",
        "priority",
        "prompt",
        "prompt_band",
        "rank",
        "size_band",
        "slots",
        "submit",
        "submitted",
        "suspects",
        "tenant",
        "tokens",
        "uncached",
        "worker",
    )

    def __init__(
        self, key: Key, submit: Submit, arrays: Sequence[Array], model: str, rank: Rank, now: float
    ) -> None:
        self.key = key
        self.submit = submit
        self.prompt, self.generated, self.prefixes = arrays
        self.names: list[int] = self.prefixes.tolist()
        self.model = model
        self.rank = rank
        self.priority = submit.priority  # lower goes first
        self.tenant = submit.tenant
        self.is_retry = submit.attempt > 0
        self.suspects = max(0, submit.suspects)  # the size of its group; 0 when it is none (`suspects.py`)
        self.submitted = now
        self.output = UNKNOWN_OUTPUT
        self._measure()
        self.expect_uncached(self.tokens)
        self.prompt_band = band_of(len(self.prompt))
        self.size_band = band_of(self.longest)
        self.latest_start = inf
        self.late_at = inf
        self.late = False
        self.charged = 0.0
        self.worker: bytes | None = None
        self.asked = 0
        self.open = {
            choice: fingerprint(OpenChoice(*key, submit.attempt, choice)) for choice in submit.choices
        }
        self.mark = reduce(xor, self.open.values())
        self.closed: dict[int, int] = {}

    def close(self, choice: int, asked: int) -> int:
        """A choice has ended when its gateway had been asked for so many lists. Its fingerprint."""
        fingerprint = self.open.pop(choice)
        self.mark ^= fingerprint
        self.closed[choice] = asked
        return fingerprint

    def expect_uncached(self, tokens: int) -> None:
        """Set how many tokens the best worker would have to compute. Only before it is in a queue."""
        self.uncached = max(1, tokens)
        self.band = band_of(self.uncached)

    def expect_output(self, output: OutputLength) -> None:
        """Set what is expected of each choice. Only before it is in a queue."""
        self.output = output
        self._measure()

    @property
    def expected_output(self) -> float:
        """Tokens that its choices will probably generate, together.

        Lengths count as memoryless: those that a lost attempt has do not make the rest shorter.
        """
        return sum(map(self.expected_of, self.submit.generated_counts))

    def expected_of(self, count: int) -> float:
        """Tokens that a choice which has so many will probably generate yet."""
        return max(1.0, min(self.submit.sampling.max_tokens - count, self.output.mean))

    def without_choice(self, choice: int) -> None:
        """Forget one choice of a waiting request, and its tokens so far."""
        index = self.submit.choices.index(choice)
        counts = self.submit.generated_counts
        start = sum(counts[:index])
        kept = list(self.generated)
        del kept[start : start + counts[index]]
        self.generated = as_array("I", kept)
        self.submit = msgspec.structs.replace(
            self.submit,
            choices=self.submit.choices[:index] + self.submit.choices[index + 1 :],
            generated_counts=counts[:index] + counts[index + 1 :],
        )
        self._measure()

    def drop_arrays(self) -> None:
        """Free the token ids: they went to a worker, and a retry brings them again."""
        self.prompt = self.generated = _EMPTY
        self.prefixes = _NO_NAMES
        self.names = []

    def _measure(self) -> None:
        """Set the sizes that follow from its arrays, its choices and what is expected of them."""
        prompt, counts = len(self.prompt), self.submit.generated_counts
        limit, reserve = self.submit.sampling.max_tokens, self.output.reserve
        self.slots = len(counts)
        self.tokens = prompt + len(self.generated)
        self.longest = prompt + max(counts)
        if len(counts) == 1:  # as most have
            self.kv_tokens = self.tokens + max(1, min(limit - counts[0], reserve))
        else:
            self.kv_tokens = self.tokens + sum(max(1, min(limit - count, reserve)) for count in counts)


_EMPTY = as_array("I", ())
_NO_NAMES = as_array("Q", ())
