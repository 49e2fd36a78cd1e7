"""One list of models out of the lists of several schedulers. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sfllm.messages import Asset, ModelState


class ModelMerge:
    """The models of `count` schedulers, each of which is told by `set`.

    Where schedulers serve different content by one name, the content that was there first is served as long
    as anybody serves it, and `note` hears of the other once.
    """

    def __init__(self, count: int, note: Callable[[str, dict[str, object]], None]) -> None:
        self._lists: list[tuple[ModelState, ...]] = [()] * count
        self._workers: list[dict[str, int]] = [{} for _ in range(count)]
        self._contents: dict[str, tuple[object, ...]] = {}
        self._noted: set[str] = set()
        self._note = note
        self.merged: tuple[ModelState, ...] = ()
        """Each model once, with the workers of all schedulers."""

    def set(self, index: int, states: Sequence[ModelState]) -> bool:
        """Take the list of a scheduler, an empty one when it is lost. Whether anything changed."""
        if tuple(states) == self._lists[index]:
            return False
        self._lists[index] = tuple(states)
        self._contents = {
            name: self._content_of(name)
            for name in dict.fromkeys(state.card.name for states in self._lists for state in states)
        }
        found: dict[str, ModelState] = {}
        self._workers = [{} for _ in self._lists]
        for place, listed in enumerate(self._lists):
            for state in listed:
                self._add(found, place, state)
        self.merged = tuple(found.values())
        self._noted &= set(found)
        return True

    def workers(self, index: int, name: str) -> int:
        """How many workers of a scheduler can serve the model of that name."""
        return self._workers[index].get(name, 0)

    def lists(self, index: int, name: str) -> bool:
        """Whether a scheduler knows the model of that name, with or without workers."""
        return name in self._workers[index]

    def holders(self, asset: Asset) -> list[int]:
        """The schedulers that serve a model with this asset."""
        return [
            index
            for index, states in enumerate(self._lists)
            if any(asset in state.card.assets for state in states)
        ]

    def _content_of(self, name: str) -> tuple[object, ...]:
        """What is served by a name: as before while anybody serves that, else what the lists have first."""
        states = [state for states in self._lists for state in states if state.card.name == name]
        served = [state.card.content for state in states if state.workers] or [states[0].card.content]
        known = self._contents.get(name)
        return known if known is not None and known in served else served[0]

    def _add(self, found: dict[str, ModelState], index: int, state: ModelState) -> None:
        name = state.card.name
        if state.card.content != self._contents[name]:
            if name not in self._noted:
                self._noted.add(name)
                self._note("schedulers serve different models by one name", {"model": name})
            return
        self._workers[index][name] = state.workers
        known = found.get(name)
        found[name] = state if known is None else ModelState(known.card, known.workers + state.workers)
