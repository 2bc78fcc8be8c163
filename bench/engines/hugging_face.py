"""transformers as an engine to compare: its text model, scaled-dot-product attention, its own cache."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.models.minimax_m3_vl.configuration_minimax_m3_vl import MiniMaxM3VLTextConfig
from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import MiniMaxM3VLForCausalLM

from engines import CONFIG
from openm3.eval.bench_model import random_keys, random_network

_NAMES = (
    (r"^embed\.", "model.embed_tokens."),
    (r"^head\.", "lm_head."),
    (r"^(layers|norm)\.", r"model.\1."),
    (r"\.attn_norm\.", ".input_layernorm."),
    (r"\.mlp_norm\.", ".post_attention_layernorm."),
    (r"\.attn\.index_(q|k)\.", r".attn.indexer.\1_proj."),
    (r"\.attn\.index_(q|k)_norm\.", r".attn.indexer.\1_norm."),
    (r"\.attn\.(q|k|v|o)\.", r".attn.\1_proj."),
    (r"\.attn\.", ".self_attn."),
    (r"\.router\.bias$", ".gate.e_score_correction_bias"),
    (r"\.router\.", ".gate."),
    (r"\.shared\.", ".shared_experts."),
    (r"\.(gate_up|down)(\.weight)?$", r".\1_proj\2"),
)
"""Our parameter names to those of `MiniMaxM3VLForCausalLM`, applied one after the other."""


class Transformers:
    """`MiniMaxM3VLForCausalLM` in bfloat16."""

    def __init__(self) -> None:
        values = dict(CONFIG.to_hf()["text_config"])
        del values["architectures"]
        text = MiniMaxM3VLTextConfig(**values, attn_implementation="sdpa")
        weights = {}
        for name, value in random_network(CONFIG, torch.bfloat16).state_dict().items():
            for pattern, replacement in _NAMES:
                name = re.sub(pattern, replacement, name)
            weights[name] = value
        torch.set_default_dtype(torch.bfloat16)
        self.model = MiniMaxM3VLForCausalLM(text).eval()
        torch.set_default_dtype(torch.float32)
        self.model.load_state_dict(weights)

    def fill(self, length: int) -> None:
        self.cache = DynamicCache(config=self.model.config)
        self.kept: list[dict[str, Tensor]] = []
        for i in range(CONFIG.num_layers):
            keys, values, index = zip(*random_keys(CONFIG, i, length), strict=True)
            kept = {"keys": torch.cat(keys).transpose(0, 1)[None], "values": torch.cat(values).transpose(0, 1)[None]}
            kept = {name: x.contiguous() for name, x in kept.items()}
            if CONFIG.layer_types[i] == "sparse":
                kept["idx_keys"] = torch.cat(index)[None, None]
            self.cache.layers[i].lazy_initialization(kept["keys"], kept["values"])
            self.kept.append(kept)
        self.rewind()

    @torch.inference_mode()
    def read(self, ids: Sequence[int]) -> None:
        out = self.model(torch.tensor([ids]), past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.last_V = out.logits[0, -1]

    def logits(self) -> list[float]:
        logits: list[float] = self.last_V.float().tolist()
        return logits

    def rewind(self) -> None:
        # Its cache grows by concatenation and leaves the old tensors as they were.
        for layer, kept in zip(self.cache.layers, self.kept, strict=True):
            for name, value in kept.items():
                setattr(layer, name, value)
