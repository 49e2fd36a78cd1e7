"""How long the model's part of a step takes on this CPU, natively and in plain torch.

`python bench/decode_speed.py` runs the contenders in turns over the same weights and prints, for decode
steps at several batch sizes and for prefill chunks, milliseconds (median and fastest) and the ratio of the
medians. The roofline is the larger of reading all weights and keys once and of multiplying at the rate
that `--gigabytes` and `--gigaflops` state for the machine; without them it is left out.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # as a worker sets it; read when torch is loaded

import torch

from sfllm_worker.kv.cache import KVCache, bytes_per_block
from sfllm_worker.load import LoadedModel, load_model
from sfllm_worker.model.attention import AttentionBatch
from sfllm_worker.model.decoder import Decoder, DecoderWeights
from sfllm_worker.model.layers import DenseLinear, Linear
from sfllm_worker.native.decoder import NativeDecoder
from sfllm_worker.native.panels import PanelLinear

BLOCK_SIZE = 32


class Shape(NamedTuple):
    """`sequences` that compute `tokens` each, the last of `context` in the cache."""

    sequences: int
    tokens: int
    context: int


DECODES = (Shape(1, 1, 256), Shape(8, 1, 256), Shape(16, 1, 256), Shape(40, 1, 256), Shape(1, 1, 4096))
PREFILLS = (Shape(1, 128, 128), Shape(1, 512, 512), Shape(1, 512, 2048))


class Case:
    """One shape's inputs over a cache that both contenders use."""

    def __init__(self, model: LoadedModel, shape: Shape) -> None:
        generator = torch.Generator().manual_seed(0)
        width = -(-shape.context // BLOCK_SIZE)
        blocks = torch.randperm(width * shape.sequences, generator=generator) + 1
        self.shape = shape
        self.kv = KVCache(model.config, len(blocks) + 1, BLOCK_SIZE, model.dtype)
        self.kv.storage.normal_(generator=generator)
        self.batch = AttentionBatch.build(
            [shape.tokens] * shape.sequences,
            [shape.context] * shape.sequences,
            blocks.view(shape.sequences, width).tolist(),
            BLOCK_SIZE,
        )
        count = shape.sequences * shape.tokens
        self.ids = torch.randint(model.config.vocab_size, (count,), generator=generator)

    @torch.inference_mode()
    def seconds(self, decoder: Decoder, clock: Callable[[], float]) -> float:
        """Time of one step with logits of the last tokens."""
        started = clock()
        hidden = decoder.forward(self.ids, self.batch.positions, self.batch, self.kv)
        decoder.logits(hidden[self.batch.last_rows])
        return clock() - started

    def roofline(self, model: LoadedModel, gigabytes: float, gigaflops: float) -> float:
        """Seconds that no implementation can beat, at these rates per second."""
        config, shape = model.config, self.shape
        blocks = shape.sequences * -(-shape.context // BLOCK_SIZE)
        read = model.weight_bytes + blocks * bytes_per_block(config, BLOCK_SIZE, model.dtype)
        head = config.vocab_size * config.hidden_size
        queries_and_output = 2 * config.hidden_size * config.q_size
        keys_and_values = 2 * config.hidden_size * config.num_kv_heads * config.head_dim
        gates = 3 * config.hidden_size * config.intermediate_size
        body = config.num_layers * (queries_and_output + keys_and_values + gates)
        products = 2 * shape.sequences * (body * shape.tokens + head)
        scores = 4 * config.num_layers * config.q_size * shape.sequences * shape.tokens
        seen = shape.context - shape.tokens / 2
        return max(read / gigabytes / 1e9, (products + scores * seen) / gigaflops / 1e9)


def plain_weights(weights: DecoderWeights) -> DecoderWeights:
    """The same weights as torch multiplies them."""

    def plain(linear: Linear) -> Linear:
        return DenseLinear(linear.dense()) if isinstance(linear, PanelLinear) else linear

    layers = tuple(
        replace(
            layer,
            qkv=plain(layer.qkv),
            attention_output=plain(layer.attention_output),
            gate_up=plain(layer.gate_up),
            down=plain(layer.down),
        )
        for layer in weights.layers
    )
    return replace(weights, layers=layers, head=plain(weights.head))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", default="smollm2-135m", help="directory, or built-in shape for dummy weights"
    )
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", choices=["native", "torch"], help="one contender alone")
    parser.add_argument("--gigabytes", type=float, default=0, help="memory read rate of the machine, GB/s")
    parser.add_argument("--gigaflops", type=float, default=0, help="rate of products in --dtype, GFLOP/s")
    parser.add_argument("--quantization", default="none", help="int8 or int4; only natively")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    is_directory = os.path.isdir(arguments.model)  # noqa: PTH112 - a name is not yet a path
    model = load_model(
        arguments.model,
        dtype=arguments.dtype,
        load_format="auto" if is_directory else "dummy",
        quantization=arguments.quantization,
    )
    native = model.decoder
    if not isinstance(native, NativeDecoder):
        raise SystemExit("no native kernels on this machine")
    contenders: dict[str, Decoder] = {"native": native}
    if arguments.only != "native" and arguments.quantization == "none":
        contenders["torch"] = Decoder(native.config, plain_weights(native.weights))
    if arguments.only == "torch":
        del contenders["native"]
    print(f"{torch.get_num_threads()} threads, {arguments.dtype}, torch {torch.__version__}")
    for shape in (*DECODES, *PREFILLS):
        case = Case(model, shape)
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(arguments.rounds if shape.tokens == 1 else max(3, arguments.rounds // 3)):
            for name, decoder in contenders.items():
                times[name].append(case.seconds(decoder, clock) * 1e3)
        line = f"{shape.sequences:3} x {shape.tokens:3} tokens, context {shape.context:4}: "
        medians = {name: statistics.median(values) for name, values in times.items()}
        line += "  ".join(f"{name} {medians[name]:6.1f} / {min(times[name]):6.1f} ms" for name in times)
        if len(times) == 2:
            line += f"  ratio {medians['torch'] / medians['native']:.1f}"
        if arguments.gigabytes and arguments.gigaflops:
            floor = case.roofline(model, arguments.gigabytes, arguments.gigaflops) * 1e3
            line += f"  roofline {floor:.1f} ms"
        print(line)


if __name__ == "__main__":
    main()
