"""Initial weights: random, but with the wiring that looking things up needs already laid out.

A transformer learns to copy from earlier text ("induction") only after very many tokens: it must find two things
together, heads that bring the previous few tokens along, and heads that match them. This recipe has a hundredth of
those tokens, so it starts from both, in the spirit of mimetic initialisation (Trockman and Kolter, 2023):

- Embeddings fill the first third of the residual stream and share one constant channel.
- In layer 0 each head reads the constant through its rotary channels, turned so that the scores peak one token back for
  head 0, two for head 1 and so on, and writes what it finds to a part of the stream of its own. The fastest channels
  tell neighbours apart; without the slower ones the same peak would come again and again far back.
- In the matching layers the content channels of a query read "this token, the one before, the one before that", those
  of a key read "the token before, ...": their product is large where the same text stood before.
- The index branch of every layer starts as a copy of the attention it is to predict.
- What stands for a picture has the constant channel too, and fills the content's part of the stream.

Everything is trained from there on; nothing is frozen.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from openm3.model.attention import Attention
from openm3.model.moe import Moe
from openm3.model.network import Network

MATCHING_LAYERS = (2, 3)
LOOK_BACK = (1.4, 1.4, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)
"""Amplitudes of the rotary channel pairs, fastest first, that look back: with norm weights of 3 (1 + 2), 99% of the
attention is on the one token among a million. Four pairs alone leave 7% there among 32,768, 2% among 131,072."""


@torch.no_grad()
def initialise(network: Network, seed: int) -> None:
    """Fill every parameter. The same seed gives the same weights."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float) -> Tensor:
        return torch.randn(shape, generator=generator) * scale

    for name, p in network.named_parameters():
        if p.ndim == 1 or name.endswith((".down.weight", "experts.down")):
            p.zero_()
        else:
            p.copy_(normal(*p.shape, scale=0.02 if name == "head.weight" else p.shape[-1] ** -0.5))
    if network.config.vision is not None:
        _initialise_vision(network)
    wiring = _Wiring(network, normal(network.config.hidden_size, network.config.hidden_size, scale=1.0))
    network.embed.weight.zero_()
    network.embed.weight[:, : wiring.content] = normal(network.config.vocab_size, wiring.content, scale=0.5)
    network.embed.weight[:, wiring.constant] = 1.0
    for i, layer in enumerate(network.layers):
        attention, mlp = layer.attn, layer.mlp
        assert isinstance(attention, Attention)
        attention.o.weight.mul_(0.3)
        if isinstance(mlp, Moe):
            mlp.router.weight.mul_(0.5)
        if i == 0:
            wiring.look_back(attention, network.config.rope_theta)
        elif i in MATCHING_LAYERS:
            wiring.match(attention)
        if attention.sparse and attention.config.index_dim == attention.config.head_dim:
            _copy_to_index(attention)


def _initialise_vision(network: Network) -> None:
    """Plain norms, small outputs, and tokens that look like embeddings: content, and the constant channel."""
    for module in network.vision.modules():
        if isinstance(module, nn.LayerNorm):
            module.weight.fill_(1.0)
    patch = network.vision.patch_embed.weight
    patch.mul_((patch.shape[-1] / patch[0].numel()) ** 0.5)
    for name, weight in network.vision.named_parameters():
        if name.endswith("attn.o.weight"):
            weight.mul_(0.3)
    content = network.config.hidden_size // 3 - 1
    merge = network.projector.merge_2
    merge.weight[content:].mul_(0.1)
    merge.bias[content] = 1.0


class _Wiring:
    """Where things are in the residual stream at first: token content, one constant channel, a part for each head."""

    def __init__(self, network: Network, noise: Tensor) -> None:
        c = network.config
        self.config = c
        self.content = c.hidden_size // 3 - 1
        self.constant = self.content
        self.part = (c.hidden_size - self.content - 1) // c.num_heads
        self.project = noise[: self.part, : self.content] * self.content**-0.5
        self.mix = noise[: c.head_dim, -self.part :] * self.part**-0.5

    def part_of(self, head: int) -> slice:
        start = self.content + 1 + head * self.part
        return slice(start, start + self.part)

    def look_back(self, attention: Attention, theta: float) -> None:
        """Head h attends to the token h + 1 back and writes its content to part h."""
        c = self.config
        half = c.rotary_dim // 2
        amplitude = torch.tensor(LOOK_BACK[:half])
        used = len(amplitude)
        angle = theta ** -(torch.arange(used, dtype=torch.float32) / half)
        for weight in (attention.q.weight, attention.k.weight):
            weight.mul_(0.1)
        q = attention.q.weight.view(c.num_heads, c.head_dim, -1)
        k = attention.k.weight.view(c.num_groups, c.head_dim, -1)
        k[:, :used, self.constant] = amplitude
        v = attention.v.weight.view(c.num_groups, c.head_dim, -1)
        v.mul_(0.1)
        v[:, : self.part, : self.content] = self.project
        o = attention.o.weight.view(-1, c.num_heads, c.head_dim)
        o.mul_(0.1)
        for head in range(c.num_heads):
            turn = -angle * (head + 1)
            q[head, :used, self.constant] = amplitude * turn.cos()
            q[head, half : half + used, self.constant] = amplitude * turn.sin()
            o[self.part_of(head), head, : self.part] += 0.3 * torch.eye(self.part)
        attention.q_norm.weight.fill_(2.0)
        attention.k_norm.weight.fill_(2.0)

    def match(self, attention: Attention) -> None:
        """Content channels of queries read tokens t, t-1, t-2; those of keys s-1, s-2, s-3."""
        c = self.config
        q = attention.q.weight.view(c.num_heads, c.head_dim, -1)
        k = attention.k.weight.view(c.num_groups, c.head_dim, -1)
        q.mul_(0.1)
        k.mul_(0.1)
        free = c.head_dim - c.rotary_dim
        shares = [free - 2 * (free // 3), free // 3, free // 3]
        first = c.rotary_dim
        for back, share in enumerate(shares):
            rows = slice(first, first + share)
            mix = self.mix[rows]
            if back == 0:
                q[:, rows, : self.content] += mix @ self.project
            else:
                q[:, rows, self.part_of(back - 1)] += mix
            k[:, rows, self.part_of(back)] += mix
            first += share
        attention.q_norm.weight.fill_(0.5)
        attention.k_norm.weight.fill_(0.5)


def _copy_to_index(attention: Attention) -> None:
    """Start the index branch as one head of each group."""
    c = attention.config
    step = c.num_heads // c.num_groups
    q = attention.q.weight.view(c.num_heads, c.head_dim, -1)[::step]
    attention.index_q.weight.copy_(q.reshape(attention.index_q.weight.shape))
    attention.index_k.weight.copy_(attention.k.weight[: c.head_dim])
    attention.index_q_norm.weight.copy_(attention.q_norm.weight)
    attention.index_k_norm.weight.copy_(attention.k_norm.weight)
