"""Stages without a model: the device's own speed, and attention against the bytes that it reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from bench.gpu_bench.place import Place, Row

from sfllm_worker.backends import make_attention
from sfllm_worker.kv.cache import KVCache
from sfllm_worker.load.dummy import dummy_config
from sfllm_worker.model.attention import AttentionBatch
from sfllm_worker.model.config import ModelConfig

BLOCK = 32
COPY = "copy, read and written"


def device_speed(place: Place) -> list[Row]:
    """Copy bandwidth, bytes read plus bytes written, and the speed of a large product."""
    count, size = (2**22, 128) if place.quick else (2**31, 8192)
    repeats = 2 if place.quick else 20
    source = torch.ones(count, dtype=torch.int8, device=place.device)
    copied = place.milliseconds(partial(torch.empty_like(source).copy_, source), repeats)
    a, b = (torch.randn(size, size, device=place.device).to(place.dtype) for _ in range(2))
    multiplied = place.milliseconds(partial(torch.mm, a, b, out=torch.empty_like(a)), repeats)
    product = f"product of {size}x{size} matrices"
    return [
        {"what": COPY, "value": 2 * count / copied / 1e9, "unit": "TB/s"},
        {"what": product, "value": 2 * size**3 / multiplied / 1e9, "unit": "TFLOP/s"},
    ]


def attention(place: Place) -> Iterator[Row]:
    """Decodes over long and short contexts, and chunks."""
    decodes = [(2, 64)] if place.quick else [(1, 32768), (8, 8192), (64, 1024), (256, 1024)]
    chunks = [(2, 32)] if place.quick else [(1, 8192), (4, 2048), (16, 512)]
    for shape in decodes:
        yield decode(place, *shape)
    for shape in chunks:
        yield chunk(place, *shape)


def decode(place: Place, batch: int, context: int) -> Row:
    """One layer's decode, of several layers in turn, so that no cache holds what is read."""
    config = ModelConfig.from_hf(dummy_config(place.model))
    kv, step = prepared(place, config, [1] * batch, [context] * batch)
    q = torch.randn(batch, config.num_heads, config.head_dim, device=place.device).to(place.dtype)
    launched = make_attention(config, place.dtype, place.device).begin(step)

    def attend() -> None:
        for layer in kv.layers:
            launched.attend(layer, q)

    each = place.milliseconds(as_graph(place, attend), 2 if place.quick else 10) / len(kv.layers)
    bytes_read = 2 * batch * context * config.kv_size * place.dtype.itemsize
    return {"what": f"decode, {batch} x {context}", "ms": each, "TB/s": bytes_read / each / 1e9}


def chunk(place: Place, batch: int, length: int) -> Row:
    """One layer's prefill of whole prompts."""
    config = ModelConfig.from_hf(dummy_config(place.model))
    kv, step = prepared(place, config, [length] * batch, [length] * batch)
    q = torch.randn(batch * length, config.num_heads, config.head_dim, device=place.device)
    launched = make_attention(config, place.dtype, place.device).begin(step)
    work = partial(launched.attend, kv.layers[0], q.to(place.dtype))
    each = place.milliseconds(work, 2 if place.quick else 20)
    # Half of the square is masked; two products of two operations each.
    operations = 2 * batch * length * (length + 1) * config.num_heads * config.head_dim
    return {"what": f"prefill, {batch} x {length}", "ms": each, "TFLOP/s": operations / each / 1e9}


def as_graph(place: Place, work: Callable[[], None]) -> Callable[[], None]:
    """The same launches as a CUDA graph, so that their number costs nothing; on a CPU just the work."""
    if not place.on_gpu:
        return work
    work()
    place.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def prepared(
    place: Place, config: ModelConfig, queries: list[int], contexts: list[int]
) -> tuple[KVCache, AttentionBatch]:
    """A cache full of random numbers, and a step over scattered blocks of it."""
    needed = [-(-context // BLOCK) for context in contexts]
    kv = KVCache(config, sum(needed) + 1, BLOCK, place.dtype, place.device)
    for layer in kv.layers:
        layer.k.normal_()
        layer.v.normal_()
    order = (torch.randperm(sum(needed), generator=torch.Generator().manual_seed(0)) + 1).tolist()
    tables = [[order.pop() for _ in range(count)] for count in needed]
    return kv, AttentionBatch.build(queries, contexts, tables, BLOCK, place.device)
