"""What several benchmarks share: the model, tables, timing, states of the cache."""
