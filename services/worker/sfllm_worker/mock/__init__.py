"""A worker without a model: the whole protocol, made-up tokens at a set rate, and no torch."""
