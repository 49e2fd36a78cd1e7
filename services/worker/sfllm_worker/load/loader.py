"""Loads a model from whatever it is stored as."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from sfllm.messages import Pooling
from sfllm_worker.backends import make_decoder
from sfllm_worker.load.assets import GenerationDefaults, generation_defaults, model_assets, read_json
from sfllm_worker.load.dummy import DummySource, dummy_assets, dummy_config
from sfllm_worker.load.fingerprint import directory_fingerprint
from sfllm_worker.load.gguf_cache import converted
from sfllm_worker.load.pooling import stored_pooling
from sfllm_worker.load.safetensors_files import SafetensorsSource
from sfllm_worker.load.weights import TensorSource, build_weights
from sfllm_worker.model.config import ModelConfig
from sfllm_worker.model.decoder import Decoder, TextModel
from sfllm_worker.model.errors import ModelLoadError
from sfllm_worker.model.families import find_family
from sfllm_worker.model.transformers_model import dummy_transformers_model, load_transformers_model
from sfllm_worker.quant.products import Products

_log = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LOAD_FORMATS = ("auto", "dummy")


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run, and what a model card and a gateway need to know about it."""

    config: ModelConfig
    decoder: TextModel
    name: str
    """The last part of the path it came from."""
    fingerprint: str
    """Hexadecimal; equal for equal weights, dtype and quantization. Separates KV caches and model cards."""
    assets: dict[str, bytes]
    """Tokenizer and template files, see `model_assets`."""
    generation: GenerationDefaults
    pooling: Pooling | None = None
    """How the model is meant to make embeddings, None if it says nothing of them."""

    @property
    def dtype(self) -> torch.dtype:
        """Element type of weights, activations and KV."""
        return self.decoder.dtype

    @property
    def weight_bytes(self) -> int:
        """Memory that the weights take."""
        return self.decoder.weight_bytes

    @property
    def bos_token_id(self) -> int | None:
        """The token that starts a text, when the model has one."""
        return self.config.bos_token_id

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every token that ends a text: the configuration's and the generation defaults'."""
        return tuple(dict.fromkeys((*self.config.eos_token_ids, *self.generation.eos_token_ids)))

    @property
    def max_context_length(self) -> int:
        """Tokens of prompt and answer together that the model's positions cover."""
        return self.config.max_context_length


@dataclass(frozen=True)
class _Use:
    """How a model is to be run; see `load_model`."""

    dtype: str
    device: torch.device
    context_length: int | None
    products: Products

    def decoder(self, raw: Mapping[str, object], dtype: torch.dtype, source: TensorSource) -> Decoder:
        """The built-in decoder with the weights of `source`."""
        config = ModelConfig.from_hf(raw, self.context_length)
        products, device = self.products, self.device
        make_linear = products.maker(device, dtype)
        weights = build_weights(config, source, dtype, device, products.stored_bits(device), make_linear)
        decoder = make_decoder(config, weights, self.context_length, products.deterministic)
        products.check_decoder(decoder)
        return decoder

    def refuse_products(self, raw: Mapping[str, object]) -> None:
        """Raise ModelLoadError if a model that runs through transformers needs products of another kind."""
        wanted = f"quantization {self.products.quantization}" if self.products.quantization != "none" else ""
        if self.products.deterministic:
            wanted = "deterministic"
        if wanted:
            raise ModelLoadError(
                f"{wanted} is not supported for {raw.get('architectures')}, which runs through transformers"
            )


def load_model(
    path: str | Path,
    *,
    dtype: str = "auto",
    device: torch.device | str = "cpu",
    load_format: str = "auto",
    seed: int = 0,
    context_length: int | None = None,
    quantization: str = "none",
    deterministic: bool = False,
) -> LoadedModel:
    """Load a Hugging Face directory, a `.gguf` file, or random weights (`load_format="dummy"`).

    For dummy weights `path` is a directory with a `config.json` or the name of a built-in shape, and
    `seed` chooses the weights. `dtype` is "float32", "bfloat16", "float16" or "auto". `context_length` is
    the longest context that will be served, None for all the model has: models with rotary factors for
    short and for long contexts use one set, and this chooses it. `quantization` is "none", "int8",
    "int4" (for CPUs) or "fp8" (for GPUs). With `deterministic` a token does not depend on its batch. Both are
    for architectures that the built-in decoder knows; others run through transformers.
    Raises `ModelLoadError` for anything that is wrong with the model.
    """
    if load_format not in LOAD_FORMATS:
        raise ModelLoadError(f"unknown load format: {load_format} (supported: {', '.join(LOAD_FORMATS)})")
    target = torch.device(device)
    products = Products(quantization, deterministic)
    products.check(target)
    use = _Use(dtype, target, context_length, products)
    with torch.inference_mode():
        if load_format == "dummy":
            return _load_dummy(str(path), use, seed)
        source = Path(path)
        if source.suffix == ".gguf":
            # GGUF weights are quantized, so no stored dtype can be kept.
            chosen = resolve_dtype(dtype, None, target)
            # A GPU quantizes what it is given; a file's own few bits are in another layout.
            stored_as = quantization if target.type == "cpu" else "none"
            directory = converted(source, chosen, quantization=stored_as)
            stored = str(chosen).removeprefix("torch.")
            return _load_directory(directory, source.stem, replace(use, dtype=stored))
        return _load_directory(source, source.resolve().name, use)


def resolve_dtype(name: str, stored: str | None, device: torch.device) -> torch.dtype:
    """The dtype to run in; "auto" keeps a stored 16- or 32-bit dtype.

    float16 has no fast products on CPUs, so "auto" turns it into bfloat16 there. Raises
    `ModelLoadError` for a name that is not supported.
    """
    if name == "auto":
        name = stored if stored in _DTYPES else "bfloat16"
        if name == "float16" and device.type == "cpu":
            name = "bfloat16"
    if name not in _DTYPES:
        raise ModelLoadError(f"unsupported dtype: {name} (supported: auto, {', '.join(_DTYPES)})")
    return _DTYPES[name]


def _load_dummy(path: str, use: _Use, seed: int) -> LoadedModel:
    raw = dummy_config(path)
    chosen = resolve_dtype(use.dtype, _stored_dtype(raw), use.device)
    directory = Path(path)
    decoder: TextModel
    if find_family(raw) is None:
        use.refuse_products(raw)
        decoder = dummy_transformers_model(raw, directory, chosen, use.device, seed)
    else:
        decoder = use.decoder(raw, chosen, DummySource(seed, chosen, use.device))
    identity = repr((decoder.config, seed, chosen, use.products.quantization))
    generation = generation_defaults(directory) if directory.is_dir() else GenerationDefaults()
    return LoadedModel(
        config=decoder.config,
        decoder=decoder,
        name=directory.name,
        fingerprint=hashlib.sha256(identity.encode()).hexdigest()[:32],
        assets=dummy_assets(path, decoder.config.vocab_size),
        generation=generation,
    )


def _load_directory(directory: Path, name: str, use: _Use) -> LoadedModel:
    if not directory.is_dir():
        raise ModelLoadError(f"{directory} is not a directory")
    raw = read_json(directory / "config.json")
    chosen = resolve_dtype(use.dtype, _stored_dtype(raw), use.device)
    decoder: TextModel
    if find_family(raw) is None:
        use.refuse_products(raw)
        decoder = load_transformers_model(raw, directory, chosen, use.device)
    else:
        source = SafetensorsSource(directory)
        decoder = use.decoder(raw, chosen, source)
        _warn_unexpected(decoder.config, source)
    return LoadedModel(
        config=decoder.config,
        decoder=decoder,
        name=name,
        fingerprint=directory_fingerprint(directory, chosen, decoder.config, use.products.quantization),
        assets=model_assets(directory),
        generation=generation_defaults(directory),
        pooling=stored_pooling(directory, decoder.config.hidden_size),
    )


def _stored_dtype(raw: dict[str, object]) -> str | None:
    """The dtype in a `config.json`: `dtype` since transformers 5, `torch_dtype` before."""
    value = raw.get("dtype", raw.get("torch_dtype"))
    return value if isinstance(value, str) else None


def _warn_unexpected(config: ModelConfig, source: SafetensorsSource) -> None:
    """Tensors that were left over may mean that the model is not what its configuration says."""
    expected = {"lm_head.weight"} if config.tie_word_embeddings else set()
    unexpected = [
        name for name in source.untaken() if name not in expected and not name.endswith("rotary_emb.inv_freq")
    ]
    if unexpected:
        _log.warning("ignored %d unexpected tensors, the first is %s", len(unexpected), unexpected[0])
