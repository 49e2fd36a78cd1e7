"""Model loading: safetensors directories, GGUF files and random weights."""

from sfllm_worker.load.assets import GenerationDefaults
from sfllm_worker.load.loader import LoadedModel, load_model
from sfllm_worker.model.errors import ModelLoadError

__all__ = ["GenerationDefaults", "LoadedModel", "ModelLoadError", "load_model"]
