"""The loss that teaches the vision tower what is where, beside the loss of answers.

From answers alone a small model does not learn to see in the time there is: a picture's tokens are noise to the text
layers at first, which learn to pass them over, and then nothing tells the tower what to make of them. So tokens of
pictures that are known to show something are drawn to the embedding of the text token that stands for it, "7" or
" red": what copies text can copy what is seen. Beside that every token has to know its place in the picture, which a
tower with relative positions alone has no need to find out. Both are trained along with all the rest and are no part of
the model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openm3.config import ModelConfig
from openm3.train.data import Glimpse


class SightLoss(nn.Module):
    """Cross-entropy of what is shown among all that is shown in the step, and squared error of places."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.place = nn.Linear(config.hidden_size, 2)

    def forward(self, images: Sequence[tuple[Glimpse, Tensor]], embed_VD: Tensor) -> tuple[Tensor, float | None]:
        """The loss in nats, 0 without pictures, and the share of tokens that are nearest to something they show, None
        without.

        `images` are pictures with their tokens [I, D]; the embeddings get no gradient.
        """
        known = [(glimpse, image_ID) for glimpse, image_ID in images if len(glimpse.place_N)]
        if not known:
            return embed_VD.new_zeros(()), None
        id_C, column_N = torch.cat([glimpse.name_N for glimpse, _ in known]).unique(return_inverse=True)
        rows, columns, weights, first = [], column_N, torch.cat([g.weight_N for g, _ in known]), 0
        for glimpse, image_ID in known:
            rows.append(glimpse.place_N + first)
            first += len(image_ID)
        share_IC = torch.zeros((first, len(id_C))).index_put((torch.cat(rows), columns), weights, accumulate=True)
        shown_I = share_IC.sum(1) > 0
        share_IC = share_IC[shown_I] / share_IC[shown_I].sum(1, keepdim=True)
        image_ID = torch.cat([image_ID for _, image_ID in known])
        score_IC = image_ID[shown_I] @ embed_VD[id_C].detach().mT
        name = -(share_IC * score_IC.log_softmax(-1)).sum(-1).mean()
        right = share_IC.gather(1, score_IC.argmax(-1, keepdim=True)) > 0
        return name + F.mse_loss(
            self.place(image_ID), torch.cat([_places(g) for g, _ in known])
        ), right.float().mean().item()


def _places(glimpse: Glimpse) -> Tensor:
    """Where each token's middle is in the picture, [I, 2]: down and to the right, from -1 to 1, times two."""
    _, h, w = glimpse.media.grids[0]
    down, right = (2 * (2 * torch.arange(n) + 1) / n - 2 for n in (h // 2, w // 2))
    return torch.cartesian_prod(down, right)
