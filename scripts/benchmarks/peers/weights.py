"""The model of the benchmark in the forms that the peers read: a Hugging Face folder and a GGUF
file with float16 weights.

Both are written once into the work folder, from the same GGUF file that our own code reads.
"""

import json
from pathlib import Path

import numpy as np

HF_FOLDER, F16_FILE = "smollm2-hf", "smollm2-f16.gguf"


def write_all(gguf: Path, work: Path) -> None:
    """Write what is not there yet."""
    if not (work / HF_FOLDER / "config.json").exists():
        write_hf_folder(gguf, work / HF_FOLDER)
    if not (work / F16_FILE).exists():
        write_f16(gguf, work / F16_FILE)


def write_hf_folder(gguf: Path, folder: Path) -> None:
    """Dequantized float32 weights as safetensors; config.json last, which marks the folder as
    complete.
    """
    from safetensors.numpy import save_file

    from diffkv_jax.models.gguf_source import GGUFSource

    source = GGUFSource(gguf)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: np.empty(info.shape, np.float32) for name, info in source.tensors.items()}
    for name, start, rows in source.stream():
        tensors[name][start : start + len(rows)] = rows
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(
        json.dumps({"architectures": ["LlamaForCausalLM"], **source.config}, default=str)
    )


def write_f16(gguf: Path, path: Path) -> None:
    """A copy of a GGUF file whose matrices are float16; vectors stay float32, as llama.cpp's own
    converter has them.
    """
    from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
    from gguf.quants import dequantize

    reader, partial = GGUFReader(str(gguf)), path.with_suffix(".partial")
    writer = GGUFWriter(partial, reader.fields["general.architecture"].contents())
    for name, part in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        is_array = part.types[0] == GGUFValueType.ARRAY
        writer.add_key_value(
            name, part.contents(), part.types[0], part.types[-1] if is_array else None
        )
    writer.add_file_type(1)  # mostly float16
    for tensor in reader.tensors:
        values = np.asarray(
            dequantize(tensor.data, GGMLQuantizationType(tensor.tensor_type)), np.float32
        )
        values = values.reshape([int(n) for n in reversed(tensor.shape)])
        writer.add_tensor(tensor.name, values.astype(np.float16) if values.ndim > 1 else values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(path)
