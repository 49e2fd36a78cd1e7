"""Where requests go: what gateways know of the schedulers, and how many requests they have open there."""

from __future__ import annotations

from collections.abc import Sequence

from sfllm.rendezvous import Candidate, choose, routing_key
from sfllm.wire import Array


class Placing:
    """The choice of a scheduler by the rule of the live gateways (`sfllm.rendezvous`).

    All gateways hear of schedulers and their workers at the same moment, so they know the same: `known` are
    the schedulers that answer. But each has loads of its own, as it counts only its own requests: `loads`
    are open requests by gateway and scheduler.
    """

    def __init__(self, gateways: int, addresses: Sequence[str]) -> None:
        self.known = list(range(len(addresses)))
        self.loads = [[0] * len(addresses) for _ in range(gateways)]
        self._addresses = addresses
        self._workers = [0] * len(addresses)
        self._lists_model = [False] * len(addresses)

    @property
    def has_choice(self) -> bool:
        """Whether there are several schedulers."""
        return len(self._addresses) > 1

    def serves(self, index: int) -> bool:
        """Whether a scheduler answers and has workers."""
        return self._workers[index] > 0 and index in self.known

    def hear(self, index: int, workers: int | None) -> bool:
        """A scheduler has so many workers, or has never had any (None). Whether their number is news."""
        count = workers or 0
        is_news = self._workers[index] != count
        self._workers[index] = count
        self._lists_model[index] = workers is not None
        return is_news

    def find(self, index: int) -> None:
        """A scheduler answers."""
        if index not in self.known:
            self.known.append(index)
            self.known.sort()

    def lose(self, index: int) -> None:
        """A scheduler does not answer any more: it serves nothing."""
        self.known.remove(index)
        self._workers[index] = 0
        self._lists_model[index] = False

    def choose(self, gateway: int, names: Array, request_id: str) -> int | None:
        """The scheduler for a request among those that serve; None without any."""
        serving = [index for index in self.known if self._workers[index]]
        return self._choose_of(serving, gateway, names, request_id) if serving else None

    def choose_any(self, gateway: int, names: Array, request_id: str) -> int:
        """The scheduler for a new request: one that serves, else one that knows the model, else any."""
        index = self.choose(gateway, names, request_id)
        if index is not None:
            return index
        listing = [index for index in self.known if self._lists_model[index]]
        return self._choose_of(listing or self.known, gateway, names, request_id)

    def put(self, gateway: int, index: int) -> None:
        """A gateway has one request more at this scheduler."""
        self.loads[gateway][index] += 1

    def take(self, gateway: int, index: int) -> None:
        """A gateway has one request less there."""
        self.loads[gateway][index] -= 1

    def _choose_of(self, indices: Sequence[int], gateway: int, names: Array, request_id: str) -> int:
        if len(indices) == 1:
            return indices[0]
        loads = self.loads[gateway]
        candidates = [
            Candidate(self._addresses[index], max(1, self._workers[index]), loads[index]) for index in indices
        ]
        return indices[choose(routing_key(names, request_id), candidates)]
