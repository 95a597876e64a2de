"""All that a GPU can be asked: the kernels, and `generate` end to end."""
