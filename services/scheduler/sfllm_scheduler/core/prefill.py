"""How many tokens a worker still has to prefill, as far as the scheduler knows."""

from __future__ import annotations


class OutstandingPrefill:
    """The prefill of what one worker was granted under one lease.

    Every grant has a number, and the worker says how many grants it had got when it counted what was left
    (`WorkerProgress`). So what it counted and what it had not seen add up, however late the message comes.
    What a worker says cannot exceed what it holds: when nothing is held here nothing is outstanding.
    `tokens` is what is outstanding.
    """

    def __init__(self) -> None:
        self.grants = 0
        self.tokens = 0
        self._seen = 0
        self._lost = 0
        self._floor = 0
        self._pending = 0
        self._unseen_tokens = 0
        self._seen_tokens = 0
        self._unseen: dict[int, int] = {}

    @property
    def charged(self) -> int:
        """What was charged for all that the worker holds, computed or not."""
        return self._unseen_tokens + self._seen_tokens

    def next_grant(self) -> int:
        """Number a grant that is about to be sent."""
        self.grants += 1
        return self.grants

    def charge(self, grant: int, tokens: int) -> None:
        """A request of a grant that was not seen yet counts that many tokens, at least 1."""
        self._unseen_tokens += tokens
        self._unseen[grant] = self._unseen.get(grant, 0) + tokens
        self.tokens += tokens

    def discharge(self, grant: int, tokens: int) -> None:
        """A request of a grant is over, so nothing of it is left to compute."""
        if grant in self._unseen:
            self._unseen_tokens -= tokens
            self._unseen[grant] -= tokens
            if not self._unseen[grant]:
                del self._unseen[grant]  # its requests are all over
        else:
            self._seen_tokens -= tokens
        self._count()

    def arrived(self, grant: int) -> None:
        """The worker surely had this grant before it sends anything more: correct its count of grants.

        Called with the newest grant of what it holds, when it holds just what it should. A grant that got
        lost is missing in its count for good, and would make all later ones look unseen.
        """
        self._floor = max(self._floor, grant)

    def progress(self, grants: int, pending_tokens: int) -> None:
        """The worker has got so many grants, and so many tokens of them are left.

        Raises ValueError when that cannot be.
        """
        if grants < 0 or pending_tokens < 0 or grants + self._lost > self.grants:
            raise ValueError("a worker counts grants or tokens that it cannot have")
        self._lost = max(self._lost, self._floor - grants)
        self._seen = max(self._seen, grants + self._lost)
        self._pending = pending_tokens
        while self._unseen and (grant := next(iter(self._unseen))) <= self._seen:
            tokens = self._unseen.pop(grant)
            self._unseen_tokens -= tokens
            self._seen_tokens += tokens
        self._count()

    def _count(self) -> None:
        self.tokens = self._unseen_tokens + min(self._pending, self._seen_tokens)
