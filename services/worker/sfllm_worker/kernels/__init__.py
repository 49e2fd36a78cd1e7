"""Triton kernels of the GPU worker: one file each, with the function that launches it.

Nothing outside a GPU's path imports these modules, so a CPU worker needs no triton.
"""
