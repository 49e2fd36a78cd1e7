"""The C structures of `src/step.h`, field by field. Sizes are compared when the library is loaded."""

from __future__ import annotations

from ctypes import POINTER, Structure, c_double, c_float, c_int64, c_uint64, c_void_p

FLOAT32, BFLOAT16 = 0, 1

PLAIN_ROWS = -1
"""The kind of an embedding that is no panels; see `src/embedding.h`."""


class Matrix(Structure):
    """A weight `[rows, columns]` in panels, its bias in float32, the panels' kind (`quant.panels`) and bytes.

    `unpacked` is what a quantized or compressed one is for products of many tokens, or null.
    """

    _fields_ = (
        *((name, c_void_p) for name in ("weight", "bias")),
        *((name, c_int64) for name in ("rows", "columns", "kind", "panel_bytes")),
        ("unpacked", c_void_p),
    )


class LayerSpec(Structure):
    """A decoder layer."""

    _fields_ = (
        *((name, Matrix) for name in ("qkv", "output", "gate_up", "down")),
        *((name, c_void_p) for name in ("input_norm", "qk_norm", "post_attention_norm")),
        *((name, c_void_p) for name in ("pre_feedforward_norm", "post_feedforward_norm")),
        ("rotation", c_int64),
        ("window", c_int64),
    )


class ModelSpec(Structure):
    """What stays the same from step to step."""

    _fields_ = (
        *((name, c_int64) for name in ("element_type", "hidden_size", "intermediate_size", "heads")),
        *((name, c_int64) for name in ("kv_heads", "head_dim", "num_layers", "activation")),
        *((name, c_float) for name in ("norm_eps", "attention_scale", "attention_soft_cap")),
        ("final_norm", c_void_p),
        ("layers", POINTER(LayerSpec)),
    )


class RotationSpec(Structure):
    """Cosines and sines by position."""

    _fields_ = (("table", c_void_p), ("channels", c_int64))


class KVSpec(Structure):
    """The paged cache."""

    _fields_ = (("storage", c_void_p), ("num_blocks", c_int64), ("block_size", c_int64))


class StepSpec(Structure):
    """One step's inputs, working memory and result."""

    _fields_ = (
        *((name, c_int64) for name in ("num_tokens", "num_sequences", "table_width")),
        *((name, c_void_p) for name in ("positions", "slots", "context_lens", "last_rows")),
        ("block_tables", c_void_p),
        ("rotations", POINTER(RotationSpec)),
        *((name, c_void_p) for name in ("hidden", "added", "narrow", "wanted")),
        ("num_wanted", c_int64),
        ("result", c_void_p),
        ("threads", c_int64),
    )


class AttentionSpec(Structure):
    """Attention alone over one layer of the cache."""

    _fields_ = (
        *((name, c_int64) for name in ("element_type", "heads", "kv_heads", "head_dim", "block_size")),
        ("window", c_int64),
        ("scale", c_float),
        ("soft_cap", c_float),
        *((name, c_void_p) for name in ("queries", "keys", "values", "result")),
    )


class SampleSpec(Structure):
    """How one row's token is chosen."""

    _fields_ = (
        ("top_p", c_double),
        ("temperature", c_float),
        ("min_p", c_float),
        ("top_k", c_int64),
        *((name, c_uint64) for name in ("seed", "position", "choice")),
        ("allowed", c_void_p),
    )


ALL = (Matrix, LayerSpec, ModelSpec, RotationSpec, KVSpec, StepSpec, AttentionSpec, SampleSpec)
"""In the order in which the library tells their sizes."""
