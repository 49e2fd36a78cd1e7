"""Weights of fewer bits: how they are chosen, held, and laid out for the native kernels."""
