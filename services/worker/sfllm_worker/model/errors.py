"""The one exception for everything that can be wrong with a model's files."""


class ModelLoadError(ValueError):
    """A model cannot be loaded; the message names the file, field or tensor and what was expected."""
