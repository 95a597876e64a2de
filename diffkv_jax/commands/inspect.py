"""`diffkv inspect`."""

import json

import typer

from diffkv_jax.commands import options
from diffkv_jax.commands.failing import told


@told
def inspect(
    model: options.Model, dtype: options.Dtype = "auto", as_json: options.AsJson = False
) -> None:
    """A model's keys and values, and what some caches cost on it."""
    from diffkv_jax.commands.loading import load
    from diffkv_jax.fitting.inspect import inspect_model

    loaded = load(model, dtype)
    report = inspect_model(loaded.model, loaded.params)
    if not as_json:
        typer.echo(str(report))
        return
    arrays = ("layers", "key_norm", "value_norm", "key_offset", "value_offset")
    found = {name: getattr(report, name).tolist() for name in arrays}
    found |= {"mean_kl": dict(report.mean_kl), "context": report.context}
    typer.echo(json.dumps(found))


command = inspect
