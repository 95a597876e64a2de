"""`load_pretrained`: a model, its parameters and its tokenizer from files on disk;
`convert_pretrained` saves them again.
"""

import logging
from pathlib import Path
from typing import Any, NamedTuple

from diffkv_jax.arguments import flag
from diffkv_jax.calibration.sample_text import sample_text

from .checkpoint import Checkpoint, check_destination, is_checkpoint, save_checkpoint
from .decoder import Decoder, param_shapes
from .end_tokens import with_generation_config
from .fill import fill_params
from .folder import hugging_face_packages, read_tokenizer
from .hf_config import config_from_hf
from .hub import locate
from .registry import build_model
from .source import DTYPES, WeightSource

_logger = logging.getLogger("diffkv_jax")


class Pretrained(NamedTuple):
    """What `load_pretrained` returns; unpacks as `model, params, tokenizer`."""

    model: Decoder
    params: dict[str, Any]
    tokenizer: Any | None


def load_pretrained(
    path: str | Path,
    dtype: str = "auto",
    *,
    revision: str | None = None,
    tokenizer: str | Path | None = None,
    progress: bool | None = None,
) -> Pretrained:
    """Load a model from files on disk, or by its name on the Hugging Face Hub.

    Args:
        path: a folder written by `save_checkpoint`, a Hugging Face folder with safetensors weights,
            a .gguf file (of a split one any part, with the others beside it), or a name on the
            Hugging Face Hub such as "Qwen/Qwen3-0.6B", whose files go into the Hub's own cache and
            are found there without a network.
        dtype: dtype of parameters and activations: "float32", "bfloat16" or "float16"; "auto" is
            the file's own, as config.json states it or else most of its numbers have it, and
            bfloat16 where the file is quantized.
        revision: of a name on the Hub, a branch, tag or commit.
        tokenizer: a folder with tokenizer files to use instead of those at `path`.
        progress: show a progress bar; None: where standard error is a terminal. A converted
            checkpoint has none.
    Returns:
        (model, params, tokenizer). tokenizer is a Hugging Face tokenizer, or None (with a warning)
        where `path` holds none. model.stop_token_ids are the end tokens: those of
        generation_config.json, else of config.json; of a GGUF file those its keys name (eos, eot,
        eom) and those that llama.cpp knows by their text, such as <end_of_turn>. With a tokenizer
        the model holds the built-in calibration text (model.text), for policies that learn.
    Raises:
        ValueError: nothing loadable at `path`, a name that is neither on the Hub nor in its cache,
            damaged files, an unsupported model, or weights that do not fit the model exactly.
        ModuleNotFoundError: a package of the "hf" extra is needed and absent.
    """
    _check_dtype(dtype)
    progress = None if progress is None else flag("progress", progress)
    path = locate(path, revision)
    return _load(path, _open(path), dtype, tokenizer, progress)


def convert_pretrained(
    source: str | Path,
    destination: str | Path,
    dtype: str = "auto",
    *,
    revision: str | None = None,
    overwrite: bool = False,
    progress: bool | None = None,
) -> None:
    """Read what `load_pretrained` reads and write it as a checkpoint folder, with config,
    generation config, tokenizer and chat template.

    Args: source, dtype, revision, progress as in `load_pretrained`; destination, overwrite as in
    `save_checkpoint`. Raises: as those two do; what can be checked is checked before the weights
    are read.
    """
    _check_dtype(dtype)
    progress = None if progress is None else flag("progress", progress)
    destination = Path(destination).expanduser().absolute()
    check_destination(destination, overwrite)
    source = locate(source, revision)
    opened = _open(source)
    loaded = _load(source, opened, dtype, None, progress)
    save_checkpoint(
        destination,
        loaded.params,
        opened.config,
        loaded.tokenizer,
        opened.generation_config,
        overwrite=overwrite,
    )


def _load(
    path: Path,
    opened: Checkpoint | WeightSource,
    dtype: str,
    tokenizer: str | Path | None,
    progress: bool | None,
) -> Pretrained:
    """The tokenizer before the weights: it fails sooner."""
    config = config_from_hf(with_generation_config(opened.config, opened.generation_config))
    model = build_model(config, opened.dtype if dtype == "auto" else dtype)
    text = _tokenizer(path, opened, tokenizer)
    shapes = param_shapes(model)
    if isinstance(opened, Checkpoint):
        params = opened.read_params(shapes)
    else:
        params = fill_params(opened, shapes, origin=str(path), progress=progress)
    _log_windows(model)
    return Pretrained(model.clone(text=sample_text(text, config.vocab_size)), params, text)


def _check_dtype(dtype: str) -> None:
    if dtype not in ("auto", *DTYPES):
        raise ValueError(
            f"dtype must be one of {('auto', *DTYPES)}, given {dtype!r}: pass one of these strings"
        )


def _open(path: Path) -> Checkpoint | WeightSource:
    if path.is_file():
        return _open_file(path)
    if is_checkpoint(path):
        if weights := sorted(file.name for file in path.glob("model*.safetensors")):
            raise ValueError(
                f"{path} must hold either params/ or {weights}, but holds both: move one of them "
                "elsewhere"
            )
        return Checkpoint(path)
    with hugging_face_packages(path):
        from .safetensors_source import SafetensorsSource, is_safetensors_folder
    if is_safetensors_folder(path):
        return SafetensorsSource(path)
    raise ValueError(
        f"{path} must hold model.safetensors, model.safetensors.index.json or params/: "
        f"{_what_is_there(path)}"
    )


def _open_file(path: Path) -> WeightSource:
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ValueError(
            f"{path} must start with the bytes b'GGUF', given {magic!r}: pass a GGUF file, or the "
            "folder for other formats"
        )
    with hugging_face_packages(path):
        from .gguf_source import GGUFSource
    return GGUFSource(path)


def _what_is_there(folder: Path) -> str:
    """The remedy, from what the folder holds instead."""
    if ggufs := sorted(folder.glob("*.gguf")):
        return f"pass the GGUF file itself, one of {[file.name for file in ggufs]}"
    if pickles := sorted([*folder.glob("*.bin"), *folder.glob("*.pt*")]):
        return (
            f"save {[file.name for file in pickles]} again as safetensors with "
            "`model.save_pretrained(folder)`"
        )
    return "pass the folder that holds the weights"


def _tokenizer(
    path: Path, opened: Checkpoint | WeightSource, folder: str | Path | None
) -> Any | None:
    if folder is not None:
        tokenizer = read_tokenizer(locate(folder, weights=False))
        if tokenizer is None:
            raise ValueError(
                f"tokenizer={str(folder)!r} must be a folder with a tokenizer.json: copy the "
                "model's tokenizer files there"
            )
        return tokenizer
    with hugging_face_packages(path):
        tokenizer = opened.tokenizer()
    if tokenizer is None:
        _logger.warning("%s holds no tokenizer: the tokenizer returned is None", path)
    return tokenizer


def _log_windows(model: Decoder) -> None:
    """How many layers a cache policy can compress."""
    windows = model.attention.sliding_windows
    sizes = sorted({window for window in windows if window is not None})
    if not sizes:
        _logger.info("%d layers: %d compressed", len(windows), len(windows))
        return
    kept = sum(window is not None for window in windows)
    tokens = " or ".join(str(size) for size in sizes)
    _logger.warning(
        "%d layers: %d compressed, %d keep a full-precision window of %s tokens",
        len(windows),
        len(windows) - kept,
        kept,
        tokens,
    )
