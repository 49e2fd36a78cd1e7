"""Models with quantized weights, loaded as a worker loads them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from gguf_files import write_gguf
from model_references import Sequences, make_reference
from torch import Tensor

from sfllm.settings import WorkerSettings
from sfllm_worker.load import LoadedModel, ModelLoadError, load_model
from sfllm_worker.load.dummy import DummySource
from sfllm_worker.load.safetensors_files import SafetensorsSource
from sfllm_worker.load.weights import build_weights
from sfllm_worker.model.decoder import Decoder, DecoderWeights
from sfllm_worker.quant.linear import QuantizedLinear
from sfllm_worker.quant.policy import BITS
from sfllm_worker.quant.quantize import quantize
from sfllm_worker.quant.weight import QuantizedWeight
from sfllm_worker.startup import build

MODES = ["int8", "int4"]
CPU = torch.device("cpu")


def dummy(shape: str, dtype: str, quantization: str) -> LoadedModel:
    return load_model(shape, dtype=dtype, load_format="dummy", quantization=quantization)


def plain_weights(model: LoadedModel, quantization: str) -> DecoderWeights:
    source = DummySource(0, model.dtype, CPU)
    return build_weights(model.config, source, model.dtype, CPU, BITS[quantization])


def tokens(count: int, seed: int = 0) -> list[int]:
    values: list[int] = torch.randint(300, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return values


def logits(decoder: Decoder, text: list[int]) -> Tensor:
    [result] = Sequences(decoder, 1, 256).step([(0, text)])
    return result


@pytest.mark.parametrize("quantization", MODES)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-5), ("bfloat16", 0.05)])
@pytest.mark.parametrize("shape", ["tiny-llama", "tiny-qwen3"])
def test_a_loaded_model_equals_plain_torch_over_the_same_weights(
    shape: str, dtype: str, tolerance: float, quantization: str
) -> None:
    model = dummy(shape, dtype, quantization)
    reference = Decoder(model.config, plain_weights(model, quantization))
    assert isinstance(reference.weights.head, QuantizedLinear)
    for count in (1, 3, 14, 200):
        text = tokens(count, seed=count)
        torch.testing.assert_close(
            logits(model.decoder, text), logits(reference, text), rtol=tolerance, atol=tolerance
        )


@pytest.mark.parametrize("quantization", MODES)
def test_a_token_is_the_same_to_the_last_bit_in_any_batch(quantization: str) -> None:
    model = dummy("tiny-qwen3", "bfloat16", quantization)
    texts = [tokens(count, seed=count) for count in (1, 7, 30, 150)]
    together = Sequences(model.decoder, 4, 160).step(list(enumerate(texts)))
    for text, row in zip(texts, together, strict=True):
        assert torch.equal(logits(model.decoder, text)[-1], row[-1])


def test_fewer_bits_take_less_memory() -> None:
    sizes = [dummy("tiny-llama", "bfloat16", name).weight_bytes for name in ("none", *MODES)]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == len(sizes)


def test_a_tied_embedding_is_held_once_and_an_untied_one_stays_as_it_is() -> None:
    tied, untied = (
        plain_weights(dummy(shape, "bfloat16", "int4"), "int4") for shape in ("tiny-qwen3", "tiny-llama")
    )
    assert isinstance(tied.head, QuantizedLinear)
    assert tied.head.weight.bits == 8
    assert not isinstance(tied.embedding, Tensor)
    assert isinstance(untied.embedding, Tensor)
    assert isinstance(untied.head, QuantizedLinear)
    assert untied.head.weight.bits == 8


@pytest.mark.parametrize("quantization", MODES)
def test_a_checkpoint_is_quantized_part_by_part(tmp_path: Path, quantization: str) -> None:
    make_reference("llama-biased", tmp_path)
    model = load_model(tmp_path, dtype="float32", quantization=quantization)
    source = SafetensorsSource(tmp_path)
    weights = build_weights(model.config, source, torch.float32, CPU, BITS[quantization])
    key = weights.layers[1].qkv
    assert isinstance(key, QuantizedLinear)
    q, kv = model.config.q_size, model.config.kv_size
    stored = source.take("model.layers.1.self_attn.k_proj.weight", (kv, model.config.hidden_size))
    alone = quantize(stored, BITS[quantization] or 0)
    assert torch.equal(key.weight.dequantize()[q : q + kv], alone.dequantize())
    torch.testing.assert_close(
        logits(model.decoder, tokens(40)),
        logits(Decoder(model.config, weights), tokens(40)),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize("quantization", MODES)
def test_a_gguf_file_with_rows_in_another_order_gives_the_model_of_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantization: str
) -> None:
    monkeypatch.setenv("SFLLM_CACHE_DIR", str(tmp_path / "cache"))
    directory = tmp_path / "checkpoint"
    reference = make_reference("llama", directory)
    write_gguf(reference, "llama", tmp_path / "model.gguf")
    first, second = (
        load_model(path, dtype="float32", quantization=quantization)
        for path in (directory, tmp_path / "model.gguf")
    )
    assert torch.equal(logits(first.decoder, tokens(60)), logits(second.decoder, tokens(60)))


def test_models_in_different_bits_have_different_identities(tmp_path: Path) -> None:
    make_reference("llama", tmp_path)
    names = ("none", *MODES)
    loaded = [load_model(tmp_path, dtype="float32", quantization=name) for name in names]
    dummies = [dummy("tiny-llama", "float32", name) for name in names]
    assert len({model.fingerprint for model in (*loaded, *dummies)}) == 2 * len(names)


def test_what_cannot_be_quantized_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(
        ModelLoadError, match=r"unknown quantization: int3 \(supported: none, int8, int4, fp8\)"
    ):
        dummy("tiny-llama", "float32", "int3")
    with pytest.raises(ModelLoadError, match="int4 is for CPUs, and the model runs on meta"):
        load_model("tiny-llama", device="meta", load_format="dummy", quantization="int4")
    with pytest.raises(ModelLoadError, match=r"fp8 needs a GPU of compute capability 8\.0 or more"):
        dummy("tiny-llama", "float32", "fp8")
    (tmp_path / "config.json").write_text(
        json.dumps({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"})
    )
    with pytest.raises(ModelLoadError, match=r"int8 is not supported for \['GPT2LMHeadModel'\]"):
        load_model(tmp_path, load_format="dummy", quantization="int8")
    with pytest.raises(ModelLoadError, match=r"int8 is not supported for \['GPT2LMHeadModel'\]"):
        load_model(tmp_path, quantization="int8")
    with pytest.raises(ModelLoadError, match=r"deterministic is not supported for \['GPT2LMHeadModel'\]"):
        load_model(tmp_path, deterministic=True)


class Broken:
    """A checkpoint whose second layer has a weight that is not a number."""

    def __init__(self) -> None:
        self._dummy = DummySource(0, torch.float32, CPU)

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        tensor = self._dummy.take(name, shape)
        if name.startswith("model.layers.1.mlp.up"):
            tensor[3, 5] = float("nan")
        return tensor

    def take_quantized(self, name: str, shape: tuple[int, int], /) -> QuantizedWeight | None:
        return None


def test_a_weight_that_is_no_number_is_refused_by_name() -> None:
    config = dummy("tiny-llama", "float32", "none").config
    with pytest.raises(ModelLoadError, match=r"model\.layers\.1\.mlp\.up_proj\.weight cannot be quantized"):
        build_weights(config, Broken(), torch.float32, CPU, 4)


def test_a_worker_quantizes_as_its_settings_say_and_tells_the_scheduler() -> None:
    settings = WorkerSettings(
        model="tiny-llama", load_format="dummy", quantization="int4", max_running_tokens=512, device="cpu"
    )
    parts = build(settings)
    assert parts.card.quantization == "int4"
