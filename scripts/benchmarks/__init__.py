"""What is measured: kernels, peers, methods, quality, recall, and what chips would take.

`python -m benchmarks --help` from scripts/, or from anywhere with scripts/ on PYTHONPATH.
"""
