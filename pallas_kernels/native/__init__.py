"""C++ headers of the native kernels, and what compiles, loads and registers them."""
