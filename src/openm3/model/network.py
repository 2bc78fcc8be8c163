"""The network: embed, layers, norm, head. It knows batches and pools, no requests, no text and no files."""

from __future__ import annotations

from collections.abc import Generator, Sequence

import torch
from torch import Tensor, nn

from openm3.config import BLOCK, ModelConfig
from openm3.model.attention import Attention, Norm, Observer
from openm3.model.batch import Batch
from openm3.model.linear import Linear
from openm3.model.moe import Mlp, Moe
from openm3.model.vision import Grid, Projector, Tower, finished, normalised
from openm3.ops.cache import Pool
from openm3.ops.index import new_codes
from openm3.ops.linear import linear
from openm3.ops.native import blank
from openm3.ops.norm import rms_norm, rotary_table


class Layer(nn.Module):
    """Pre-norm attention and feed-forward with plain residuals."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.attn_norm = Norm(config.hidden_size)
        self.attn = Attention(config, layer)
        self.mlp_norm = Norm(config.hidden_size)
        self.mlp = Moe(config) if config.mlp_types[layer] == "moe" else Mlp(config, config.dense_size)

    def forward(
        self, x_TD: Tensor, batch: Batch, rope: tuple[Tensor, Tensor], pool: Pool | None, observer: Observer | None
    ) -> Tensor:
        x_TD = x_TD + self.attn(rms_norm(x_TD, self.attn_norm.weight, self.eps), batch, rope, pool, observer)
        y_TD: Tensor = x_TD + self.mlp(rms_norm(x_TD, self.mlp_norm.weight, self.eps))
        return y_TD


class TiedHead(nn.Module):
    """A head without weights of its own: the embedding's rows."""

    def __init__(self, embed: nn.Embedding) -> None:
        super().__init__()
        # Inside a tuple the embedding is not registered a second time.
        self._shared = (embed,)

    def forward(self, x_TD: Tensor) -> Tensor:
        return linear(x_TD, self._shared[0].weight)


class Network(nn.Module):
    """The text decoder, and the vision tower if the model has one.

    Parameters start at zero or at PyTorch's defaults; a checkpoint or a recipe fills them.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_layers))
        self.norm = Norm(config.hidden_size)
        tied = config.tie_embeddings
        self.head = TiedHead(self.embed) if tied else Linear(config.hidden_size, config.vocab_size)
        if config.vision is not None:
            self.vision = Tower(config.vision)
            self.projector = Projector(config.vision, config.hidden_size)

    def hidden(self, batch: Batch, pools: Sequence[Pool] | None = None, observer: Observer | None = None) -> Tensor:
        """Final normed states [T, D]. With pools, keys are written to them; without, sequences must be whole."""
        c = self.config
        x_TD = self.embed(batch.ids_T)
        if batch.place_I is not None and batch.image_ID is not None:
            x_TD = x_TD.index_copy(0, batch.place_I, batch.image_ID)
        rope = rotary_table(batch.position_T, c.rotary_dim, c.rope_theta)
        for i, layer in enumerate(self.layers):
            x_TD = layer(x_TD, batch, rope, None if pools is None else pools[i], observer)
        return rms_norm(x_TD, self.norm.weight, c.norm_eps)

    def see(self, patch_IC: Tensor, grids: Sequence[Grid]) -> Tensor:
        """What stands for the placeholders of pictures, [I / 4, D]: for uint8 pixels [I, C] in the order of `grids`."""
        return finished(self.looking(patch_IC, grids, patch_IC.shape[0]))

    def looking(self, patch_IC: Tensor, grids: Sequence[Grid], most: int) -> Generator[float, None, Tensor]:
        """The same in pieces, as `Tower.walk` yields them."""
        weight = self.vision.patch_embed.weight
        feature_IC = yield from self.vision.walk(normalised(patch_IC.to(weight.device), weight.dtype), grids, most)
        image_ID: Tensor = self.projector(feature_IC)
        return image_ID

    def forward(self, batch: Batch, pools: Sequence[Pool] | None = None, observer: Observer | None = None) -> Tensor:
        """Logits [T, V] of every token."""
        logit_TV: Tensor = self.head(self.hidden(batch, pools, observer))
        return logit_TV

    def new_pools(self, num_pages: int, dtype: torch.dtype) -> list[Pool]:
        """Empty pools of `num_pages` pages of 128 tokens, one a layer, where the weights are."""
        c, device = self.config, self.embed.weight.device
        pools = []
        for kind in c.layer_types:
            shape = (num_pages, c.num_groups, BLOCK, c.head_dim)
            k_MGBH, v_MGBH = (blank(shape, dtype, device) for _ in range(2))
            index_k_MBJ = codes = None
            if kind == "sparse":
                index_k_MBJ = blank((num_pages, BLOCK, c.index_dim), dtype, device)
                codes = new_codes(index_k_MBJ)
            pools.append(Pool(k_MGBH, v_MGBH, index_k_MBJ, codes))
        return pools
