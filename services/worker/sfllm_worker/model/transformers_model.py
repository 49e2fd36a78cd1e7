"""Decoder-only architectures that are not built in, run by transformers over the paged KV cache.

Transformers calls a registered attention function in place of its own. Ours writes keys and values to the
cache and attends there, so that a step's sequences can stand in one flat row `[1, num_tokens]` without a
mask and without a cache of transformers. Everything else of a model must treat tokens one by one; what
does not is refused when it is loaded. Code that comes with a checkpoint is never run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfllm_worker.backends import make_attention
from sfllm_worker.kv.cache import KVCache
from sfllm_worker.model.attention import AttentionBatch
from sfllm_worker.model.config import ModelConfig, refuse_quantized
from sfllm_worker.model.errors import ModelLoadError
from sfllm_worker.model.families import FAMILIES, FULL, SLIDING
from sfllm_worker.model.fields import integer, optional_id, token_ids
from sfllm_worker.model.layers import some_rows
from sfllm_worker.model.transformers_attention import PagedCall, Probe, paged_attention, run_body

ATTENTION_NAME = "sfllm_paged"

_UNSUPPORTED_ROPES = ("dynamic", "longrope")
"""Their frequencies depend on the longest sequence of a batch, so that one request would change another."""


class TransformersModel:
    """A causal language model of transformers with the surface of `Decoder`."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._body = model.base_model
        calls = _probe(self._body)
        self.config = _config(model, calls)
        self._attention = make_attention(self.config, self.dtype, self.device)
        # With its body replaced by one that returns its input, the model's own forward computes logits
        # from hidden rows, whatever scaling or capping it applies.
        setattr(model, model.base_model_prefix, _Returns())
        _check_independence(self)

    @property
    def dtype(self) -> torch.dtype:
        """Element type of weights, activations and KV."""
        dtype: torch.dtype = self._body.dtype
        return dtype

    @property
    def device(self) -> torch.device:
        """Where the weights live."""
        device: torch.device = self._body.device
        return device

    @property
    def weight_bytes(self) -> int:
        """Memory of all weights; a tied head is counted once."""
        weights = [*self._body.parameters(), *self._body.buffers(), *self._model.parameters()]
        return sum({weight.data_ptr(): weight.nbytes for weight in weights}.values())

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        batch: AttentionBatch,
        kv: KVCache,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Run one step and write its keys and values into `kv`; see `Decoder.forward`."""
        call = PagedCall(self._attention.begin(batch), kv)
        hidden = run_body(self._body, token_ids, positions, call)
        if call.layer != self.config.num_layers:
            raise RuntimeError(f"attention ran {call.layer} times for {self.config.num_layers} layers")
        return some_rows(hidden, rows)

    def logits(self, hidden_rows: Tensor) -> Tensor:
        """Logits float32 `[n, vocab_size]` of the given rows of `forward`'s result."""
        logits: Tensor = self._model(inputs_embeds=hidden_rows[None], use_cache=False).logits
        return logits[0].to(torch.float32)


def load_transformers_model(
    raw: Mapping[str, Any], directory: Path, dtype: torch.dtype, device: torch.device
) -> TransformersModel:
    """Load a directory's safetensors weights into the model that its `config.json`, `raw`, names.

    Raises `ModelLoadError` when transformers is missing, does not know the architecture or lacks weights
    for it, and for models that cannot run over the paged cache.
    """
    model_class, config = _resolve(raw, directory)
    with _as_load_errors(model_class.__name__):
        model, info = model_class.from_pretrained(
            directory,
            config=config,
            dtype=dtype,
            attn_implementation=ATTENTION_NAME,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
        lacking = sorted(map(str, (*info["missing_keys"], *info["mismatched_keys"])))
        if lacking:
            raise ModelLoadError(f"{directory}: tensor {lacking[0]} is missing or has another shape")
        return TransformersModel(model.eval().to(device))


def dummy_transformers_model(
    raw: Mapping[str, Any], directory: Path, dtype: torch.dtype, device: torch.device, seed: int
) -> TransformersModel:
    """The same with random weights."""
    model_class, config = _resolve(raw, directory)
    with _as_load_errors(model_class.__name__), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class._from_config(config, dtype=dtype, attn_implementation=ATTENTION_NAME)
        return TransformersModel(model.eval().to(device))


def _resolve(raw: Mapping[str, Any], directory: Path) -> tuple[Any, Any]:
    """Model class and configuration, for an architecture that can be expected to work."""
    kind = str(raw.get("model_type"))
    name = next(iter(raw.get("architectures") or []), f"model type {kind}")
    built_in = ", ".join(FAMILIES)
    try:
        import transformers  # noqa: PLC0415 - optional, and slow to import
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES  # noqa: PLC0415
    except ImportError as error:
        raise ModelLoadError(
            f"unsupported architecture: {name} (supported: {built_in}; more with transformers 5, which "
            'comes with pip install "sfllm[worker,transformers]")'
        ) from error
    if not raw.get("architectures"):
        name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind) or name
    if name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() or not hasattr(transformers, name):
        raise ModelLoadError(
            f"unsupported architecture: {name} is no decoder-only language model of transformers "
            f"{transformers.__version__} (supported without it: {built_in})"
        )
    model_class = getattr(transformers, name)
    _refuse_what_cannot_be_paged(raw, name, model_class)
    transformers.AttentionInterface.register(ATTENTION_NAME, paged_attention)
    library_logging: Any = transformers.utils.logging
    library_logging.disable_progress_bar()
    with _as_load_errors(name):
        return model_class, model_class.config_class.from_pretrained(directory, local_files_only=True)


def _refuse_what_cannot_be_paged(raw: Mapping[str, Any], name: str, model_class: Any) -> None:
    refuse_quantized(raw)
    if raw.get("is_encoder_decoder"):
        raise ModelLoadError(f"unsupported architecture: {name} has an encoder")
    if "vision_config" in raw or "audio_config" in raw or "text_config" in raw:
        raise ModelLoadError(f"unsupported architecture: {name} takes more than text")
    if getattr(model_class, "_is_stateful", False):
        raise ModelLoadError(f"unsupported architecture: {name} keeps a state that is not keys and values")
    other = sorted(set(raw.get("layer_types") or []) - {FULL, SLIDING})
    if other:
        raise ModelLoadError(f"unsupported layer_types: {', '.join(other)} (supported: {FULL}, {SLIDING})")
    options = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    for part in (options, *(value for value in options.values() if isinstance(value, Mapping))):
        kind = part.get("rope_type", part.get("type"))
        if kind in _UNSUPPORTED_ROPES:
            raise ModelLoadError(f"unsupported rope scaling: {kind} with {name}")


@contextlib.contextmanager
def _as_load_errors(name: str) -> Iterator[None]:
    """Turn what transformers raises for what it cannot use into `ModelLoadError`."""
    from huggingface_hub.errors import StrictDataclassError  # noqa: PLC0415 - only where transformers is

    kinds = (ValueError, TypeError, KeyError, IndexError, AttributeError, ImportError, OSError, RuntimeError)
    try:
        yield
    except ModelLoadError:
        raise
    except (*kinds, StrictDataclassError) as error:
        raise ModelLoadError(f"transformers cannot run {name}: {type(error).__name__}: {error}") from error


class _Returns(torch.nn.Module):
    """Stands in for a model's body: its hidden states are what it is given."""

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> _Hidden:
        return _Hidden(inputs_embeds)


class _Hidden:
    """A body's output that has nothing but hidden states."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: int) -> Tensor:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        """Every other output is one that was not asked for."""


@torch.inference_mode()
def _probe(body: Any) -> Probe:
    probe = Probe()
    ids = torch.zeros(2, dtype=torch.int64, device=body.device)
    run_body(body, ids, torch.arange(2, device=body.device), probe)
    return probe


def _config(model: Any, calls: Probe) -> ModelConfig:
    """The shape of the cache from what the layers asked for, the rest from transformers' configuration."""
    config, name = model.config, type(model).__name__
    raw = config.to_dict()
    if len(calls.shapes) != config.num_hidden_layers:
        raise ModelLoadError(
            f"unsupported architecture: {len(calls.shapes)} of {config.num_hidden_layers} layers of {name} "
            "attend through the interface of transformers"
        )
    (q, k, v), *rest = set(calls.shapes)
    if rest or k != v or q[-1] != k[-1]:
        raise ModelLoadError(f"unsupported architecture: keys and values of {name} differ in shape")
    kinds = getattr(config, "layer_types", None) or [None] * len(calls.shapes)
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    for kind, used in zip(kinds, calls.windows, strict=True):
        if used is None and (kind == SLIDING or (kind is None and window is not None)):
            raise ModelLoadError(f"unsupported architecture: {name} keeps its sliding window to its mask")
    heads, head_dim = q[1], q[2]
    longest = getattr(config, "max_position_embeddings", None)
    return ModelConfig(
        architecture=name,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_heads=heads,
        num_kv_heads=k[1],
        head_dim=head_dim,
        windows=tuple(calls.windows),
        max_position_embeddings=integer({"max_position_embeddings": longest}, "max_position_embeddings"),
        tie_word_embeddings=bool(getattr(config, "tie_word_embeddings", False)),
        bos_token_id=optional_id(raw, "bos_token_id"),
        eos_token_ids=token_ids(raw.get("eos_token_id")),
    )


@torch.inference_mode()
def _check_independence(model: TransformersModel) -> None:
    """Refuse a model in which neighbours in the flat row, or the place in it, change a sequence's result."""
    device = model.device
    kv = KVCache(model.config, 3, 4, model.dtype, device)
    together = AttentionBatch.build([3, 2], [3, 2], [[1], [2]], 4, device)
    ids = torch.arange(5, device=device) % model.config.vocab_size
    crowded = model.forward(ids, together.positions, together, kv)[3:].float()
    single = AttentionBatch.build([2], [2], [[2]], 4, device)
    alone = model.forward(ids[3:], single.positions, single, kv).float()
    if bool((crowded - alone).norm() > 0.05 * alone.norm()):
        raise ModelLoadError(
            f"unsupported architecture: {model.config.architecture} mixes tokens outside of attention"
        )
    model.logits(alone.to(model.dtype))
