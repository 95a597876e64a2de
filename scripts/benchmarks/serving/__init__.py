"""Many requests at once in a fixed KV memory: throughput and latencies, ours and those of peers."""
