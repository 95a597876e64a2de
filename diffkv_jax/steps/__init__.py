"""What a model call does to the cache: attend, decode, prefill and the compression event."""
