"""Arguments that several commands take."""

from typing import Annotated

import typer

POLICY = "diffkv(1, 0)"

Model = Annotated[
    str,
    typer.Argument(help="A GGUF file, a folder, or a name on the Hugging Face Hub."),
]
Policy = Annotated[
    str,
    typer.Option(
        help="A call such as 'diffkv(1, 0)' or 'quantized(\"K4V4\")'; none; auto, balanced and "
        "their like, fitted to the model first, which takes minutes; a JSON file; a folder of "
        "FittedPolicy.save.",
    ),
]
MemoryBudget = Annotated[
    str | None,
    typer.Option(help="Of the cache, such as 512MiB; without it room for all in the first tier."),
]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto: the file's own.")]
MaxNewTokens = Annotated[int, typer.Option(help="Most tokens of an answer.")]
MaxLen = Annotated[
    int | None,
    typer.Option(help="Most tokens of prompt and answer; else the model's context, 8192 at most."),
]
PrefillChunk = Annotated[
    int, typer.Option(help="Tokens of a prompt that are read at once, a power of two.")
]
Temperature = Annotated[
    float | None, typer.Option(help="0 takes the likeliest token, which is what none does too.")
]
TopK = Annotated[int | None, typer.Option(help="Draw from so many likeliest tokens.")]
TopP = Annotated[float | None, typer.Option(help="Draw from the likeliest of this probability.")]
MinP = Annotated[
    float | None, typer.Option(help="Draw from those of at least this share of the likeliest's.")
]
Seed = Annotated[int | None, typer.Option(help="Of the draws; else another one each time.")]
Stop = Annotated[list[str] | None, typer.Option(help="Text that ends the answer; may be repeated.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
