"""Who asks for what, and when: mixes of lengths, arrivals, chats that share beginnings, tenants. Seeded.

A mix says how long requests are, a process when they come. Every prompt has names for its beginnings
(`sfllm.prefixes`), made up here: equal where prompts are to begin alike.
"""

from __future__ import annotations

import random
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from heapq import heappop, heappush
from itertools import count
from operator import itemgetter
from typing import NamedTuple

from sfllm.prefixes import CHUNK_TOKENS, MAX_PREFIXES
from sfllm.wire import Array
from sfllm_cli.bench.trace import Entry

CHAT_SYSTEM_TOKENS = (512, 1024, 2048)
CHAT_SYSTEMS = 64
CHAT_TURNS = (1, 8)
CHAT_THINK_SECONDS = 20.0
CHAT_HISTORY_TOKENS = 8192
CHATS_AT_ONCE_RATE = 50.0
"""Chats that all come at once come in the order that they would have at so many requests a second."""

BURST_SECONDS = 5.0
BURST_SHARE = 0.2


class Asked(NamedTuple):
    """One request: when, how long, of whom. `deadline` is in seconds after `at`.

    `names` are those of the beginnings of its prompt and answer together: the next request of a chat may
    begin with both.
    """

    at: float
    prompt_tokens: int
    output_tokens: int
    names: Array
    tenant: str = ""
    deadline: float = 600.0

    @property
    def prompt_names(self) -> Array:
        """Names of the beginnings of its prompt, as a gateway sends them."""
        return self.names[: min((self.prompt_tokens - 1) // CHUNK_TOKENS, MAX_PREFIXES)]


Lengths = Callable[[random.Random], tuple[int, int]]
"""Prompt and output tokens of the next request."""


CONVERSATION_PROMPTS = (
    *((0.0, 2), (0.02, 91), (0.05, 181), (0.1, 207), (0.15, 372), (0.35, 414), (0.4, 703), (0.45, 984)),
    *((0.5, 1020), (0.75, 1189), (0.8, 1315), (0.85, 1877), (0.9, 2735), (0.925, 4075), (0.99, 4142)),
    *((0.999, 6212), (1.0, 14_050)),
)
CONVERSATION_OUTPUTS = (
    *((0.0, 7), (0.02, 24), (0.05, 41), (0.1, 54), (0.2, 77), (0.3, 91), (0.4, 103), (0.5, 129)),
    *((0.6, 177), (0.65, 217), (0.7, 384), (0.85, 411), (0.95, 451), (0.99, 601), (0.999, 954), (1.0, 1000)),
)
"""Shares of requests, and the length that so many do not exceed."""


def conversation(source: random.Random) -> tuple[int, int]:
    """Lengths distributed like those of the conversation trace that Azure published in 2023.

    Between its quantiles all lengths are as likely. Prompts and outputs are independent, and hardly
    correlated there.
    """
    return _quantile(CONVERSATION_PROMPTS, source.random()), _quantile(CONVERSATION_OUTPUTS, source.random())


def two_sizes(source: random.Random) -> tuple[int, int]:
    """80% of 64 and 20% of 4,096 prompt tokens."""
    return (64 if source.random() < 0.8 else 4096), _within(source.expovariate(1 / 128), 1, 1024)


def uniform(source: random.Random) -> tuple[int, int]:
    """100 to 1,024 prompt tokens, all as likely."""
    return source.randint(100, 1024), _within(source.expovariate(1 / 128), 1, 1024)


def equal(_source: random.Random) -> tuple[int, int]:
    """All the same: 512 in, 128 out."""
    return 512, 128


def mixed_40(source: random.Random) -> tuple[int, int]:
    """16 to 512 prompt tokens, 128 out."""
    return source.randint(16, 512), 128


MIXES: dict[str, Lengths] = {
    "conversation": conversation,
    "two-sizes": two_sizes,
    "uniform": uniform,
    "equal": equal,
    "w2": mixed_40,
}
CHATS = "chats"


def of_mix(lengths: Lengths, times: Iterator[float], source: random.Random) -> Iterator[Asked]:
    """Requests of a mix that share nothing."""
    for number, at in enumerate(times):
        prompt, output = lengths(source)
        yield Asked(at, prompt, output, own_names(number, prompt + output))


def of_trace(entries: Sequence[Entry], rate: float | None, requests: int) -> Iterator[Asked]:
    """A trace, again and again until there are enough requests; at `rate` a second if that is given."""
    span = entries[-1].at + entries[-1].at / max(1, len(entries) - 1) or 1.0
    stretch = 1.0 if rate is None else len(entries) / span / rate
    for number in range(requests):
        turn, index = divmod(number, len(entries))
        entry = entries[index]
        names = own_names(number, entry.prompt_tokens + entry.output_tokens)
        yield Asked((turn * span + entry.at) * stretch, entry.prompt_tokens, entry.output_tokens, names)


def of_chats(rate: float, requests: int, source: random.Random) -> Iterator[Asked]:
    """Chats: a system prompt that many share, then turns that begin with all that was said before.

    Chats begin at random times so that `rate` requests a second come in the long run; between turns passes
    some time to think. Times ascend.
    """
    mean_turns = (CHAT_TURNS[0] + CHAT_TURNS[1]) / 2
    numbers = count()
    waiting: list[tuple[float, int, int, int, list[int]]] = []
    next_chat = 0.0
    for _ in range(requests):
        while not waiting or next_chat <= waiting[0][0]:
            system = source.randrange(CHAT_SYSTEMS)
            tokens = CHAT_SYSTEM_TOKENS[system % len(CHAT_SYSTEM_TOKENS)]
            names = _names(system + 1, 0, tokens // CHUNK_TOKENS)
            heappush(waiting, (next_chat, next(numbers), source.randint(*CHAT_TURNS), tokens, names))
            next_chat += source.expovariate(rate / mean_turns)
        at, number, turns, history, names = heappop(waiting)
        prompt = history + _within(source.lognormvariate(4.0, 0.8), 8, 1024)
        output = _within(source.lognormvariate(4.6, 0.7), 4, 600)
        # The chat's own part has names of its own, the same in all of its turns.
        names += _names(CHAT_SYSTEMS + 1 + number, len(names), (prompt + output) // CHUNK_TOKENS - len(names))
        yield Asked(at, prompt, output, memoryview(array("Q", names)))
        if turns > 1 and prompt + output < CHAT_HISTORY_TOKENS:
            later = at + source.expovariate(1 / CHAT_THINK_SECONDS)
            heappush(waiting, (later, number, turns - 1, prompt + output, names))


def poisson(rate: float, requests: int, source: random.Random) -> Iterator[float]:
    """Times of a Poisson process."""
    at = 0.0
    for _ in range(requests):
        yield at
        at += source.expovariate(rate)


def bursts(rate: float, requests: int, source: random.Random) -> Iterator[float]:
    """The same number of requests on average, all of them in a fifth of the time."""
    for at in poisson(rate / BURST_SHARE, requests, source):
        yield at % BURST_SECONDS + at // BURST_SECONDS * BURST_SECONDS / BURST_SHARE


def at_once(requests: int) -> Iterator[float]:
    """All at the beginning."""
    return iter([0.0] * requests)


def shared_out(asked: Iterator[Asked], tenants: Sequence[float], source: random.Random) -> Iterator[Asked]:
    """The same requests, of tenants that send such shares of them."""
    names = [f"tenant-{number}" for number in range(len(tenants))]
    for each in asked:
        yield each._replace(tenant=source.choices(names, tenants)[0])


def own_names(number: int, tokens: int) -> Array:
    """Names for so many tokens that begin like no others."""
    return memoryview(array("Q", _names((1 << 30) + number, 0, tokens // CHUNK_TOKENS)))


def _names(owner: int, start: int, chunks: int) -> list[int]:
    first = (owner << 16) + start
    return list(range(first, first + max(0, chunks)))


def _within(value: float, low: int, high: int) -> int:
    return min(high, max(low, round(value)))


def _quantile(points: Sequence[tuple[float, int]], share: float) -> int:
    """The length at a share between 0 and 1, by linear interpolation."""
    after = bisect_right(points, share, key=itemgetter(0))
    (low, short), (high, long) = points[after - 1], points[after]
    return round(short + (long - short) * (share - low) / (high - low))
