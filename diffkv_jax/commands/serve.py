"""`diffkv serve`."""

from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from diffkv_jax.commands import options
from diffkv_jax.commands.failing import say, told


@told
def serve(
    model: options.Model,
    policy: options.Policy = options.POLICY,
    memory_budget: options.MemoryBudget = None,
    max_requests: Annotated[int, typer.Option(help="Most that are answered at once.")] = 32,
    max_len: options.MaxLen = None,
    prefill_chunk: options.PrefillChunk = 256,
    host: Annotated[str, typer.Option(help="0.0.0.0 is everyone who can reach it.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="DIFFKV_API_KEY", help="Asked of every client.")
    ] = None,
    max_queue: Annotated[
        int | None, typer.Option(min=0, help="Requests that may wait; more are refused.")
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(min=0.001, help="Seconds a request may take.")
    ] = None,
    model_name: Annotated[
        str | None, typer.Option(help="As clients call it; else the file's or folder's.")
    ] = None,
    warm_up: Annotated[
        bool, typer.Option(help="Compile all programs first: no request waits for it.")
    ] = True,
    dtype: options.Dtype = "auto",
) -> None:
    """Serve a model over HTTP, as OpenAI's clients speak it."""
    from diffkv_jax.commands.loading import engine_for, load, policy_from

    run, chosen = _server().serve, policy_from(policy)
    loaded = load(model, dtype)
    engine = engine_for(
        loaded,
        chosen,
        memory_budget,
        max_requests=max_requests,
        max_len=max_len,
        prefill_chunk=prefill_chunk,
    )
    limits = {"max_queue": max_queue, "timeout_seconds": timeout}
    given = {name: value for name, value in limits.items() if value is not None}
    name = model_name or (Path(model).name if Path(model).exists() else model)
    if warm_up:
        say("compiling; what is compiled is kept for the next time")
        engine.warm_up()
    say(f"{name} on http://{host}:{port}")
    run(engine, host=host, port=port, model_name=name, api_key=api_key, **given)


command = serve


def _server() -> Any:
    """The server's package, before a model is loaded for minutes.

    Raises:
        ModuleNotFoundError: says how to install it.
    """
    try:
        return import_module("diffkv_jax.server")
    except ModuleNotFoundError as missing:
        raise ModuleNotFoundError(
            f"the server needs {missing.name}: pip install 'diffkv-jax[serve]'"
        ) from missing
