"""`python -m diffkv_jax.commands`: the console script, from a checkout too."""

from diffkv_jax.commands import main

if __name__ == "__main__":
    main()
