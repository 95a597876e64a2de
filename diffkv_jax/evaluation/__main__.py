"""`python -m diffkv_jax.evaluation`."""

import sys

from diffkv_jax.evaluation.command import main

if __name__ == "__main__":
    sys.exit(main())
