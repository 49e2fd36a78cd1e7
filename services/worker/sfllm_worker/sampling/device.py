"""Choosing tokens on a GPU: a launch waits for nothing, and what was chosen is fetched later."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sfllm.token_batch import NO_LOGPROBS, Logprobs
from sfllm_worker.graphs.staging import Staging
from sfllm_worker.kernels.choose import choose
from sfllm_worker.kernels.greedy import Chosen, choose_greedily
from sfllm_worker.sampling.adjust import SamplingRow
from sfllm_worker.sampling.constrain import as_arrays, constrain, follow_grammars
from sfllm_worker.sampling.edits import apply_edits, as_integers, edits_of
from sfllm_worker.sampling.parameters import ParameterTable, is_greedy
from sfllm_worker.sampling.sampler import Sampled


class DeviceSampler:
    """Chooses the tokens that `sampler.sample` chooses, up to rounding, by kernels on one device.

    For one stream: launches are read in their order, and at most two of them are not yet read.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._staging = Staging(device)
        self._parameters = ParameterTable()

    def launch(self, logits: Tensor, rows: Sequence[SamplingRow]) -> DeviceSample:
        """Choose a token for each row of `logits`, float32 `[n, vocab_size]`, which may be changed.

        `rows` are read before it returns; there may be none.
        """
        if not rows:
            return DeviceSample(None, None, (), _event(self._device))
        rows, masks = follow_grammars(rows, logits.shape[1])
        reported = [index for index, row in enumerate(rows) if row.sampling.logprobs >= 0]
        edits = edits_of(rows)
        arrays = [torch.tensor(reported).numpy()] if reported else []
        if edits is not None:
            arrays += as_integers(edits)
        greedy = all(map(is_greedy, rows))
        if not greedy:
            arrays.append(self._parameters.fill(rows))
        if masks:
            arrays = [*as_arrays(masks), *arrays]
        moved = self._staging.to_device(arrays) if arrays else []
        masked, moved = (moved[:2], moved[2:]) if masks else ([], moved)
        original = logits.index_select(0, moved[0]) if reported else None
        if edits is not None:
            apply_edits(logits, moved[-len(edits) :] if greedy else moved[-len(edits) - 1 : -1])
        if masked:
            constrain(logits, *masked)
        chosen = choose_greedily(logits) if greedy else choose(logits, moved[-1])
        report = (
            None
            if original is None
            else _report(original, chosen.tokens.index_select(0, moved[0]), rows, reported)
        )
        return DeviceSample.fetch(chosen, report)


class _Report(NamedTuple):
    """Log probabilities of some rows: ids and values `[reported, width]`, and how many each row wants."""

    ids: Tensor
    values: Tensor
    wanted: dict[int, int]


def _report(logits: Tensor, tokens: Tensor, rows: Sequence[SamplingRow], reported: list[int]) -> _Report:
    vocab_size = logits.shape[1]
    wanted = {index: 1 + min(rows[index].sampling.logprobs, vocab_size) for index in reported}
    values = torch.log_softmax(logits, dim=-1)
    best, best_ids = torch.topk(values, max(wanted.values()) - 1, dim=-1)
    chosen = tokens[:, None]
    return _Report(
        torch.cat((chosen, best_ids), dim=-1), torch.cat((values.gather(-1, chosen), best), dim=-1), wanted
    )


class DeviceSample:
    """Tokens that are being chosen. Until they are read it holds pinned memory that the device writes."""

    def __init__(
        self,
        chosen: Chosen | None,
        report: _Report | None,
        fetched: Sequence[Tensor],
        arrived: torch.cuda.Event | None,
    ) -> None:
        self._chosen = chosen
        self._wanted = {} if report is None else report.wanted
        self._fetched = fetched
        self._arrived = arrived

    @classmethod
    def fetch(cls, chosen: Chosen, report: _Report | None) -> DeviceSample:
        """Start copying to the host."""
        tensors = [chosen.packed] if report is None else [chosen.packed, report.ids, report.values]
        fetched = [_to_host(tensor) for tensor in tensors]
        return cls(chosen, report, fetched, _event(chosen.packed.device))

    @property
    def tokens(self) -> Tensor:
        """Int64 `[n]` on the device, for what is launched later. Always tokens of the vocabulary."""
        return torch.empty(0, dtype=torch.int64) if self._chosen is None else self._chosen.tokens

    def read(self) -> Sampled:
        """What `sampler.sample` gives. Waits for this launch and those before it, for nothing later."""
        if self._arrived is not None:
            self._arrived.synchronize()
        if not self._fetched:
            return Sampled([], [], [])
        tokens, flags = self._fetched[0].tolist()
        sound = [flag == 1 for flag in flags]
        logprobs = [NO_LOGPROBS] * len(tokens)
        for place, (index, width) in enumerate(self._wanted.items()):
            if sound[index]:
                ids, values = (tensor[place, :width].tolist() for tensor in self._fetched[1:])
                logprobs[index] = Logprobs(width, ids, values)
        return Sampled(tokens, sound, logprobs)


def _to_host(tensor: Tensor) -> Tensor:
    """The tensor in pinned memory, once the device has come so far; torch reuses the memory safely."""
    if tensor.device.type == "cpu":
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def _event(device: torch.device) -> torch.cuda.Event | None:
    """An event at the end of what was launched; on a CPU everything is done already."""
    if device.type == "cpu":
        return None
    event = torch.cuda.Event()  # type: ignore[no-untyped-call] # torch's
    event.record(torch.cuda.current_stream(device))
    return event
