"""llama.cpp as an engine to compare: weights as GGUF, the context through its own format of saved sequences."""

from __future__ import annotations

import ctypes
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import gguf
import llama_cpp as api
import torch

from engines import CONFIG, ROOM
from openm3.eval.bench_model import random_keys, random_network


class LlamaCpp:
    """llama.cpp in its sparse setting: flash attention, one sequence, a float16 cache."""

    def __init__(self) -> None:
        self.context = None
        api.llama_backend_init()
        self._silence = api.llama_log_callback(_log_errors)
        api.llama_log_set(self._silence, None)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "m3.gguf"
            write_gguf(path)
            params = api.llama_model_default_params()
            params.use_mmap = False
            self.model = api.llama_model_load_from_file(str(path).encode(), params)
        if not self.model:
            raise RuntimeError("llama.cpp could not load the model")

    def fill(self, length: int) -> None:
        if self.context is not None:
            api.llama_free(self.context)
        params = api.llama_context_default_params()
        params.n_ctx = -(-(length + ROOM) // 256) * 256
        params.n_batch = params.n_ubatch = 512
        params.n_seq_max = 1
        params.n_threads = params.n_threads_batch = torch.get_num_threads()
        params.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_ENABLED
        self.context = api.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError(f"llama.cpp could not make a context of {params.n_ctx} tokens")
        self.length = length
        state = sequence_state(length)
        buffer = (ctypes.c_uint8 * len(state)).from_buffer(state)
        if api.llama_state_seq_set_data(self.context, buffer, len(state), 0) != len(state):
            raise RuntimeError("llama.cpp did not take the context")

    def read(self, ids: Sequence[int]) -> None:
        # The batch points to the array, which has to live as long.
        array = (api.llama_token * len(ids))(*ids)
        if api.llama_decode(self.context, api.llama_batch_get_one(array, len(ids))) != 0:
            raise RuntimeError("llama.cpp could not decode")
        # Before that the results may still be on their way.
        self.last = api.llama_get_logits_ith(self.context, -1)

    def logits(self) -> list[float]:
        return list(self.last[: CONFIG.vocab_size])

    def rewind(self) -> None:
        api.llama_memory_seq_rm(api.llama_get_memory(self.context), 0, self.length, -1)


def _log_errors(level: int, text: bytes, _data: object) -> None:
    if level == 4:
        sys.stderr.write(text.decode(errors="replace"))


def sequence_state(length: int) -> bytearray:
    """The context as llama.cpp saves one sequence: twice (keys and values; index keys) cells, keys, values by layer."""
    magic, sequence, float16 = 0xAF143CD8, 0, 1

    def number(value: int, size: int = 4) -> bytes:
        return value.to_bytes(size, "little")

    cells = torch.zeros((length, 3), dtype=torch.int32)
    cells[:, 0], cells[:, 1] = torch.arange(length), 1
    state = bytearray(number(magic) + number(sequence))
    every = list(range(CONFIG.num_layers))
    sparse = [i for i in every if CONFIG.layer_types[i] == "sparse"]
    width = CONFIG.num_kv_heads * CONFIG.head_dim
    # Beside index keys llama.cpp holds values that it never reads.
    for layers, parts in (
        (every, ((0, width), (1, width))),
        (sparse, ((2, CONFIG.index_dim), (None, CONFIG.head_dim))),
    ):
        state += number(1) + number(length) + cells.numpy().tobytes() + number(0) + number(len(layers))
        for part, row in parts:
            for layer in layers:
                state += number(float16) + number(2 * row, 8)
                if part is None:
                    state += bytes(2 * row * length)
                    continue
                for some in random_keys(CONFIG, layer, length):
                    value = some[part]
                    assert value is not None
                    state += value.half().numpy().tobytes()
    return state


_NAMES = (
    (r"^embed\.", "token_embd."),
    (r"^head\.", "output."),
    (r"^norm\.", "output_norm."),
    (r"^layers\.", "blk."),
    (r"\.mlp_norm\.", ".ffn_norm."),
    (r"\.attn\.index_(q|k)\.", r".indexer.\1_proj."),
    (r"\.attn\.index_(q|k)_norm\.", r".indexer.\1_norm."),
    (r"\.attn\.o\.", ".attn_output."),
    (r"\.attn\.", ".attn_"),
    (r"\.mlp\.router\.bias$", ".exp_probs_b.bias"),
    (r"\.mlp\.router\.", ".ffn_gate_inp."),
    (r"\.mlp\.shared\.(\w+)\.", r".ffn_\1_shexp."),
    (r"\.mlp\.experts\.(\w+)", r".ffn_\1_exps.weight"),
    (r"\.mlp\.", ".ffn_"),
)
"""Our parameter names to llama.cpp's, applied one after the other; gate_up is cut in two besides."""


def write_gguf(path: Path) -> None:
    """Write the weights as llama.cpp wants them: norms with their offset of one, index projections in float32."""
    c, name = CONFIG, "minimax-m3"
    writer = gguf.GGUFWriter(path, name)
    writer.add_string("tokenizer.ggml.model", "no_vocab")
    for key, value in {
        "vocab_size": c.vocab_size,
        "context_length": c.max_positions,
        "embedding_length": c.hidden_size,
        "block_count": c.num_layers,
        "feed_forward_length": c.dense_size,
        "attention.head_count": c.num_heads,
        "attention.head_count_kv": c.num_kv_heads,
        "attention.key_length": c.head_dim,
        "attention.value_length": c.head_dim,
        "rope.dimension_count": c.rotary_dim,
        "expert_count": c.num_experts,
        "expert_used_count": c.num_active,
        "expert_feed_forward_length": c.expert_size,
        "expert_shared_count": 1,
        "expert_gating_func": 2,
        "leading_dense_block_count": c.mlp_types.count("dense"),
        "attention.indexer.head_count": c.num_groups,
        "attention.indexer.key_length": c.index_dim,
        "attention.indexer.top_k": c.num_selected,
        "attention.indexer.block_size": 128,
        "attention.indexer.local_blocks": c.num_local,
    }.items():
        writer.add_uint32(f"{name}.{key}", value)
    writer.add_float32(f"{name}.attention.layer_norm_rms_epsilon", c.norm_eps)
    writer.add_float32(f"{name}.rope.freq_base", c.rope_theta)
    writer.add_float32(f"{name}.expert_weights_scale", c.routed_scale)
    writer.add_bool(f"{name}.expert_weights_norm", True)
    for key, value in random_network(CONFIG, torch.bfloat16).state_dict().items():
        for pattern, replacement in _NAMES:
            key = re.sub(pattern, replacement, key)
        if key.endswith("norm.weight"):
            value = value.float() + 1
        halves = value.chunk(2, dim=-2) if "gate_up" in key else (value,)
        for part, half in zip(("gate", "up"), halves, strict=False):
            title = key.replace("gate_up", part)
            if half.ndim == 1 or ".indexer." in title or ".ffn_gate_inp." in title:
                writer.add_tensor(title, half.float().contiguous().numpy())
            else:
                raw = half.contiguous().view(torch.uint8).numpy()
                writer.add_tensor(title, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
