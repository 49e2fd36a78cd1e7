"""What a modelled worker tells of its work: the beginnings that it has cached, and how requests ended."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from sfllm.messages import Finished, Timings
from sfllm.prefixes import MAX_SUMMARY_PREFIXES
from sfllm_cli.simulate.prefix_cache import PrefixCache
from sfllm_cli.simulate.work import Work

MAX_NAMES = 8 * MAX_SUMMARY_PREFIXES
"""Beginnings of prompts that are remembered for beats, those granted last."""


class GrantedNames:
    """The beginnings of the prompts that were granted last."""

    def __init__(self) -> None:
        self._names: OrderedDict[int, None] = OrderedDict()

    def add(self, names: Iterable[int]) -> None:
        """These were granted now."""
        for name in names:
            self._names[name] = None
            self._names.move_to_end(name)
        while len(self._names) > MAX_NAMES:
            self._names.popitem(last=False)

    def cached(self, cache: PrefixCache) -> list[int]:
        """Those that are still in the cache, the newest first; no more than a beat has room for."""
        names: list[int] = []
        for name in reversed(self._names):
            if name in cache:
                names.append(name)
                if len(names) == MAX_SUMMARY_PREFIXES:
                    break
        return names


def finished(work: Work, tokens: int, now: float) -> Finished:
    """The end of a request that got so many tokens in all."""
    return Finished(
        handle=work.key[1],
        attempt=work.attempt,
        choice=0,
        reason="length",
        stop_token_id=-1,
        prompt_tokens=work.prompt_tokens,
        cached_tokens=work.cached,
        generated_tokens=tokens,
        timings=Timings(
            queue_seconds=work.queue_seconds + work.admitted_at - work.granted_at,
            prefill_seconds=work.first_at - work.admitted_at,
            decode_seconds=now - work.first_at,
        ),
    )
