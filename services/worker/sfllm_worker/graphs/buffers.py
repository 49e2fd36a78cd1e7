"""The static inputs of captured graphs, and how a step is laid out in them.

A graph reads its inputs from the addresses that it was captured with. All graphs share one buffer: a key's
arrays lie one after the other at its start, so that a step reaches the device in one copy. Every element
of a key's arrays is written for every step, padding included: nothing of an earlier step can be read.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sfllm_worker.graphs.keys import GraphKey
from sfllm_worker.graphs.staging import PinnedRing, aligned
from sfllm_worker.kv.cache import PADDING_BLOCK
from sfllm_worker.model.attention import AttentionBatch

_PADDING_CONTEXT = 1
"""A padding row is a sequence of one token in the padding block: defined work with a finite result."""

_ROWS, _TOKEN_IDS, _POSITIONS, _SLOTS, _CONTEXTS = range(5)


class KeyInputs(NamedTuple):
    """What a graph was captured with: tensors at fixed addresses."""

    token_ids: Tensor
    batch: AttentionBatch
    """Its python integers hold the key's band: they choose grids. What counts is in the tensors."""


class StaticBuffers:
    """Owner of the inputs of all graphs of one device."""

    def __init__(self, keys: Iterable[GraphKey], block_size: int, device: torch.device) -> None:
        self._block_size = block_size
        size = max(self._size(key) for key in keys)
        self._storage = torch.zeros(size, dtype=torch.int64, device=device)
        self._ring = PinnedRing(device, size)
        self._inputs: dict[GraphKey, KeyInputs] = {}

    @property
    def nbytes(self) -> int:
        """Memory on the device."""
        return self._storage.nbytes

    def inputs(self, key: GraphKey) -> KeyInputs:
        """The tensors of a key, always the same."""
        found = self._inputs.get(key)
        if found is None:
            found = self._inputs[key] = self._slices(key)
        return found

    def _slices(self, key: GraphKey) -> KeyInputs:
        column = aligned(key.batch)
        parts = [self._storage[i * column : i * column + key.batch] for i in range(5)]
        width = self._width(key)
        tables = self._storage[5 * column : 5 * column + key.batch * width].view(key.batch, width)
        batch = AttentionBatch(
            query_lens=(1,) * key.batch,
            context_lens=(key.context,) * key.batch,
            num_decodes=key.batch,
            num_tokens=key.batch,
            block_size=self._block_size,
            block_tables=tables,
            context_lens_tensor=parts[_CONTEXTS],
            slot_mapping=parts[_SLOTS],
            positions=parts[_POSITIONS],
            last_rows=parts[_ROWS],
        )
        return KeyInputs(parts[_TOKEN_IDS], batch)

    def fill(self, key: GraphKey, token_ids: Tensor, batch: AttentionBatch) -> None:
        """Lay a decode-only step out for `key`, which holds it. `batch` lives on the host.

        Token ids may live on the host or, when the step before has not been read, on the device.
        """
        rows = batch.num_tokens
        host = self._laid_out(key)
        columns, tables = self._views(host, key)
        if token_ids.device.type == "cpu":
            columns[_TOKEN_IDS, :rows] = token_ids.numpy()
        columns[_POSITIONS, :rows] = batch.positions.numpy()
        columns[_SLOTS, :rows] = batch.slot_mapping.numpy()
        columns[_CONTEXTS, :rows] = batch.context_lens_tensor.numpy()
        source = batch.block_tables.numpy()
        tables[:rows, : source.shape[1]] = source
        self._ring.send(host, self._storage[: len(host)])
        if token_ids.device.type != "cpu":
            self.inputs(key).token_ids[:rows].copy_(token_ids, non_blocking=True)

    def fill_padding(self, key: GraphKey) -> None:
        """Lay out a step of padding rows alone, which touches the padding block only."""
        host = self._laid_out(key)
        self._ring.send(host, self._storage[: len(host)])

    def _laid_out(self, key: GraphKey) -> Tensor:
        """A host buffer for `key` with nothing but padding rows in it."""
        host = self._ring.take(self._size(key))
        columns, _ = self._views(host, key)
        host.fill_(PADDING_BLOCK)  # tables; token 0 at position 0 in slot 0 of that block
        columns[_ROWS] = np.arange(columns.shape[1])
        columns[_CONTEXTS] = _PADDING_CONTEXT
        return host

    def _views(self, host: Tensor, key: GraphKey) -> tuple[np.ndarray, np.ndarray]:
        """The columns `[5, at least batch]` and the tables `[batch, width]` of a host buffer."""
        values = host.numpy()
        column = aligned(key.batch)
        tables = values[5 * column : 5 * column + key.batch * self._width(key)]
        return values[: 5 * column].reshape(5, column), tables.reshape(key.batch, -1)

    def _width(self, key: GraphKey) -> int:
        return -(-key.context // self._block_size)

    def _size(self, key: GraphKey) -> int:
        return 5 * aligned(key.batch) + aligned(key.batch * self._width(key))
