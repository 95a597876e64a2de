"""The kernels of the cache, one operation at a time, against XLA."""
