"""A recorder for a machine without CUDA, and tiny decoders to record."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sfllm_worker.graphs.recorder import Recording
from sfllm_worker.load.dummy import DummySource, dummy_config
from sfllm_worker.load.weights import build_weights
from sfllm_worker.model.config import ModelConfig
from sfllm_worker.model.decoder import Decoder


class RerunRecorder:
    """Records by keeping the function: a replay runs it again on the very same buffers.

    Like a graph's, a result is overwritten by the next replay of whichever recording.
    """

    def __init__(self) -> None:
        self.captures = 0
        self.replays = 0
        self.result = torch.empty(0)

    def capture(self, function: Callable[[], Tensor]) -> Recording:
        function()
        self.captures += 1
        return _Rerun(self, function)


class _Rerun:
    def __init__(self, recorder: RerunRecorder, function: Callable[[], Tensor]) -> None:
        self.recorder = recorder
        self.function = function

    def replay(self) -> Tensor:
        self.recorder.replays += 1
        self.recorder.result.fill_(float("nan"))
        self.recorder.result = self.function()
        return self.recorder.result


def make_decoder(device: str = "cpu", **options: object) -> Decoder:
    """A decoder of two layers in plain torch; `options` go into its `config.json`."""
    config = ModelConfig.from_hf(dummy_config("tiny-llama") | options)
    source = DummySource(0, torch.float32, torch.device(device))
    with torch.inference_mode():
        return Decoder(config, build_weights(config, source, torch.float32, torch.device(device)))
