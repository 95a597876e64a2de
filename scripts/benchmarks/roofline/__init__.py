"""Bytes and FLOPs of the kernels, and chips that are not here: modelled, not measured."""
