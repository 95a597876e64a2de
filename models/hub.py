"""Where a model is: a path, or a name on the Hugging Face Hub, which is downloaded once."""

import re
from pathlib import Path

from diffkv_jax.arguments import text

from .folder import hugging_face_packages

_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
_WEIGHTS = "*.safetensors"
_TEXT = ["*.json", "*.model", "*.txt", "*.jinja"]
_OTHER_FORMATS = ["*/*", "consolidated*"]  # other formats of the same weights, and subfolders


def locate(path: str | Path, revision: str | None = None, weights: bool = True) -> Path:
    """The file or folder that `path` means.

    What exists under that path wins; else a str such as "Qwen/Qwen3-0.6B" is a name on the Hub, of
    which `revision` is a branch, tag or commit; without `weights` only its small files are fetched.

    Raises ValueError where it is neither, where the Hub has no such model or revision, and where it
    cannot be asked and the model is not in its cache.
    """
    local = Path(path).expanduser()
    revision = None if revision is None else text("revision", revision)
    if local.exists():
        if revision is not None:
            raise ValueError(
                f"{path} is on this disk, but {revision=} is of a name on the Hugging Face Hub: "
                "leave it out, or give a name that is no path here"
            )
        return local
    if isinstance(path, str) and _NAME.fullmatch(path) and local.suffix != ".gguf":
        with hugging_face_packages(local):
            return _download(path, revision, weights)
    raise ValueError(
        f"{path} must be an existing file or folder, or a model's name on the Hugging Face Hub "
        "such as 'Qwen/Qwen3-0.6B': download the model first, for instance with `hf download`, or "
        "correct the name"
    )


def _download(name: str, revision: str | None, weights: bool) -> Path:
    """The folder in the Hub's cache, brought up to date where the Hub can be asked."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    at = f"{name!r}" if revision is None else f"{name!r} ({revision=})"
    try:
        folder = snapshot_download(
            name,
            revision=revision,
            allow_patterns=[_WEIGHTS, *_TEXT] if weights else _TEXT,
            ignore_patterns=_OTHER_FORMATS,
        )
    except LocalEntryNotFoundError as error:
        raise ValueError(
            f"{at} is no path here and not complete in {constants.HF_HUB_CACHE}, and the Hugging "
            f"Face Hub cannot be asked ({_reason(error)}): download it with `hf download {name}` "
            "when online, or correct the path"
        ) from error
    except Exception as error:  # several of the Hub's, of its HTTP client, and OSError
        raise ValueError(
            f"{at} is no path here, and the Hugging Face Hub does not give it "
            f"({type(error).__name__}: {_reason(error)}): correct the name or the revision, or log "
            "in with `hf auth login` if the model is gated"
        ) from error
    if weights and not any(Path(folder).glob(_WEIGHTS)):
        raise ValueError(
            f"{at} on the Hugging Face Hub must hold safetensors weights: download another file, "
            f"such as a GGUF one, with `hf download {name} FILE`, and give its path"
        )
    return Path(folder)


def _reason(error: Exception) -> str:
    """The first line of what the Hub's client says, which goes on for paragraphs."""
    return next((line for line in str(error).splitlines() if line.strip()), "")[:200]
