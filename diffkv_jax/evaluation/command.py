"""The command line: `python -m diffkv_jax.evaluation --help`."""

import sys
from collections.abc import Sequence

from diffkv_jax.arguments import refuse
from diffkv_jax.evaluation.asked import Asked, asked_of
from diffkv_jax.evaluation.facts import about_model, circumstances
from diffkv_jax.evaluation.options import parser
from diffkv_jax.evaluation.plots import draw
from diffkv_jax.evaluation.report import markdown, write_json
from diffkv_jax.evaluation.run import Loaded, Results, measure
from diffkv_jax.models import load_pretrained


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what `argv` (None: that of the process) asks for; 0, 1 where a policy was refused
    some of it, or 2 where nothing can be measured.
    """
    options = parser()
    try:
        found, table = evaluate(asked_of(options.parse_args(argv)))
    except (ValueError, ModuleNotFoundError) as error:
        print(f"{options.prog}: {error}", file=sys.stderr)
        return 2
    print(table)
    return 1 if found.failed else 0


def evaluate(asked: Asked) -> tuple[Results, str]:
    """Load the model, measure, write results.json, results.md and plots; the Markdown too.

    Raises:
        TypeError, ValueError: bad input, named.
    """
    model, params, tokenizer = load_pretrained(asked.model, asked.dtype)
    if tokenizer is None:
        raise ValueError(
            f"--model {asked.model} holds no tokenizer, and texts need one: put the model's "
            "tokenizer files beside it"
        )
    try:
        asked.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        refuse("--out", str(asked.out), f"a folder that can be made ({error})")
    facts = {**circumstances(), "model": about_model(asked.model, model, params)}

    def keep(found: Results) -> None:
        write_json(asked.out / "results.json", facts, asked, found)

    found = measure(asked, Loaded(model, params, tokenizer), keep)
    table = markdown(facts, found)
    (asked.out / "results.md").write_text(table, encoding="utf-8")
    try:
        draw(asked.out, found)
    except ModuleNotFoundError as missing:
        print(missing, file=sys.stderr)
    return found, table
