"""What continuous batching would come to on GPUs that are not here: memory, bandwidth and
arithmetic of the datasheets, no kernel's own losses.
"""

from dataclasses import dataclass

import typer

GIB = 2**30


@dataclass(frozen=True)
class Model:
    """Of a checkpoint: parameters, bytes of weights, bytes of a bfloat16 cache a token."""

    name: str
    parameters: float
    weights: float
    token: int


@dataclass(frozen=True)
class Card:
    """Of a datasheet, times how many there are."""

    name: str
    memory: float
    bandwidth: float  # bytes a second
    flops: float  # dense bfloat16


MODELS = (
    Model("Llama-3-8B, bfloat16", 8.03e9, 16.06e9, 2 * 32 * 8 * 128 * 2),
    Model("Llama-3-70B, 8 bits", 70.6e9, 70.6e9, 2 * 80 * 8 * 128 * 2),
)
CARDS = (
    Card("H100 80GB", 80 * GIB, 3.35e12, 989e12),
    Card("H200 141GB", 141e9, 4.8e12, 989e12),
)
SHARES = {"full": 1.0, "diffkv (1, 0)": 0.30, "25 %": 0.25, "diffkv (1, 0.1)": 0.13}
USED = 0.9  # of the memory


def rate(model: Model, card: Card, share: float, prompt: int, new: int) -> tuple[int, float]:
    """Requests at once, and tokens a second of them all in a steady state: a step reads the weights
    once and every cache, and between steps prompts are read, as often as requests end.
    """
    room = USED * card.memory - model.weights
    at_once = int(room // (share * model.token * (prompt + new / 2)))
    if at_once < 1:
        return 0, 0.0
    read = model.weights + at_once * share * model.token * (prompt + new / 2)
    step = max(read / card.bandwidth, 2 * model.parameters * at_once / card.flops)
    prompts = at_once / new * 2 * model.parameters * prompt / card.flops  # a step's share of them
    return at_once, at_once / (step + prompts)


def main(prompt: int = 8192, new: int = 1024) -> None:
    """Print a Markdown table: modelled, not measured."""
    print(f"Prompts of {prompt} tokens, {new} generated.\n")
    print("| model | card | cache | requests at once | tokens/s | of the full cache |")
    print("|---|---|---|---|---|---|")
    for model in MODELS:
        for card in CARDS:
            _, full = rate(model, card, 1.0, prompt, new)
            for name, share in SHARES.items():
                at_once, found = rate(model, card, share, prompt, new)
                ratio = f"{found / full:.2f}" if full else "–"
                if not at_once:
                    continue
                line = (model.name, card.name, name, at_once, f"{found:,.0f}", ratio)
                print("| " + " | ".join(map(str, line)) + " |")


if __name__ == "__main__":
    typer.run(main)
