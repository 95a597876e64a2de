"""On a CPU beside transformers, kvpress and llama.cpp."""
