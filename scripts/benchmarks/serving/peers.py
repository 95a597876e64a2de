"""transformers' continuous batching (`generate_batch`) on torch's CPU backend."""

import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.peers.weights import HF_FOLDER, write_hf_folder
from benchmarks.serving.measured import Run, Served
from benchmarks.serving.workload import Arrival

BLOCK = 32  # tokens


def serve(gguf: Path, work: Path, workload: Sequence[Arrival], memory: int) -> Run:
    """All requests of a workload with `memory` bytes of keys and values, bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    if not (work / HF_FOLDER / "config.json").exists():
        write_hf_folder(gguf, work / HF_FOLDER)
    torch.set_grad_enabled(False)
    model = AutoModelForCausalLM.from_pretrained(
        work / HF_FOLDER, dtype=torch.bfloat16, attn_implementation="sdpa"
    ).eval()
    config = model.config
    head_dim = config.hidden_size // config.num_attention_heads
    token = 4 * config.num_hidden_layers * config.num_key_value_heads * head_dim
    blocks = memory // (token * BLOCK)
    batching = ContinuousBatchingConfig(
        num_blocks=blocks, page_size=BLOCK, max_batch_tokens=512, use_cuda_graph=False
    )
    generation = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
    manager = model.init_continuous_batching(
        generation_config=generation, continuous_batching_config=batching
    )
    manager.start()
    warm = manager.add_request(workload[0].prompt[:64], max_new_tokens=2)
    while manager.get_result(request_id=warm, timeout=1) is None:
        pass
    served: dict[str, Served] = {}
    began = time.perf_counter()
    for one in workload:
        name = manager.add_request(one.prompt, max_new_tokens=one.new_tokens, streaming=True)
        assert name is not None
        served[name] = Served(began + one.seconds)
    left = set(served)
    while left:
        found = manager.get_result(timeout=1)
        if found is None:
            continue
        now, one = time.perf_counter(), served[found.request_id]
        one.tokens += [now] * (len(found.generated_tokens) - len(one.tokens))
        if found.is_finished():
            left.discard(found.request_id)
    seconds = time.perf_counter() - began
    manager.stop(block=True)
    return Run(list(served.values()), seconds, [0])
