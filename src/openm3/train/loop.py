"""The training loop: batches, losses, two optimisers, checkpoints that a kill cannot tear.

It knows recipes and the network; where text comes from and where the result goes is the command's business.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from openm3.model.attention import Heads
from openm3.model.batch import Batch
from openm3.model.moe import Router
from openm3.model.network import Network
from openm3.model.vision import Grid, normalised
from openm3.ops.dispatch import use
from openm3.tokens.media import Media
from openm3.train.data import Glimpse, Mixture, Prefetcher, Sample, SequenceMaker
from openm3.train.index_loss import index_kl
from openm3.train.initial import initialise
from openm3.train.optim import Muon
from openm3.train.recipe import Recipe, Stage
from openm3.train.sight_loss import SightLoss

PATCHES = 512
"""Patches are computed in multiples of this many."""

_INSIDE = ("layers.", "vision.", "projector.")


@dataclass(frozen=True)
class Report:
    """What one step measured. Losses in nats a token, speed in tokens a second.

    `seen_exact` is of answers on sight, `sight_exact` of what is where in pictures, None without any; `sight_loss` is
    `SightLoss`.
    """

    step: int
    stage: str
    text_loss: float
    answer_loss: float
    answer_exact: float
    seen_exact: float | None
    sight_loss: float
    sight_exact: float | None
    index_loss: float
    tokens: int
    seconds: float


class Trainer:
    """One training run that can be stopped and resumed at any step."""

    def __init__(
        self, recipe: Recipe, maker: SequenceMaker, *, worker: int = 0, low_precision: bool, compiled: bool
    ) -> None:
        self.recipe = recipe
        self.maker = maker
        self.low_precision = low_precision
        self.compiled = compiled
        self.network = Network(recipe.model)
        initialise(self.network, recipe.seed)
        self.sight = SightLoss(recipe.model) if recipe.model.vision else None
        self.matrices, vectors = _split_parameters(self.network)
        vectors += self.sight.parameters() if self.sight else []
        dtype = torch.bfloat16 if low_precision else torch.float32
        self.muon = Muon(self.matrices, dtype=dtype)
        self.adam = torch.optim.AdamW(vectors, betas=(0.9, 0.98), weight_decay=0.0, eps=1e-10)
        self.rows = torch.Generator().manual_seed(1000 * recipe.seed + worker)
        self.step = 0
        self.kept: list[tuple[int, dict[str, Tensor]]] = []

    def run(self, on_step: Callable[[Report], None], save_to: Path | None = None) -> None:
        """Train to the recipe's end, saving every few minutes; Ctrl-C saves and stops."""
        saved = time.monotonic()
        feed = Prefetcher(self.maker, self._mixtures())
        try:
            for rows in feed:
                on_step(self.train_step(rows))
                if save_to is not None and time.monotonic() - saved > 60 * self.recipe.checkpoint_minutes:
                    self.save(save_to)
                    saved = time.monotonic()
        finally:
            feed.close()
            if save_to is not None:
                self.save(save_to)

    def train_step(self, samples: list[Sample]) -> Report:
        """One update from some sequences and pictures."""
        begin = time.perf_counter()
        stage = self.stage()
        rows = [sample for sample in samples if len(sample.ids_T)]
        batch = Batch.whole([r.ids_T for r in rows], [r.position_T for r in rows])
        losses: list[Tensor] = []
        chosen = [self._index_rows(row) for row in rows]

        def observer(layer: int, heads: Heads, batch: Batch) -> None:
            losses.append(index_kl(heads, batch, chosen, selected=stage.selected))

        with self._fast():
            images = self._look(samples)
            sight, named = torch.zeros(()), None
            if self.sight is not None:
                sight, named = self.sight(images, self.network.embed.weight)
            hidden_TD = self.network.hidden(self._with_images(batch, rows, images), observer=observer)
            text, answer, exact, seen = self._language_losses(hidden_TD, rows)
            index = torch.stack(losses).sum()
            loss = self.recipe.text_weight * text + answer + self.recipe.index_weight * index
            (loss + self.recipe.sight_weight * sight).backward()
        self._average_gradients()
        self._update()
        self.step += 1
        if stage.kept and (self.step == self.recipe.steps or self.stage() is not stage):
            weights = {name: value.clone() for name, value in self.network.state_dict().items()}
            self.kept.append((stage.kept, weights))
        tokens = int(batch.ids_T.shape[0])
        seconds = time.perf_counter() - begin
        sights = sight.item(), named
        return Report(
            self.step, stage.name, text.item(), answer.item(), exact, seen, *sights, index.item(), tokens, seconds
        )

    def stage(self) -> Stage:
        """The stage that the next step belongs to."""
        return self._place()[0]

    def learning_rate(self) -> float:
        """Share of the full rate at this step: the stage's, and a linear warm-up at the very start."""
        stage, done = self._place()
        first, last = stage.rate
        return min(1.0, (self.step + 1) / self.recipe.warmup_steps) * (first + (last - first) * done / stage.steps)

    def _place(self) -> tuple[Stage, int]:
        """The stage of the next step, and how many of its steps are done."""
        done = self.step
        for stage in self.recipe.stages:
            if done < stage.steps:
                return stage, done
            done -= stage.steps
        return self.recipe.stages[-1], self.recipe.stages[-1].steps

    def save(self, path: Path) -> None:
        """Write everything needed to go on, atomically."""
        state = {
            "recipe": self.recipe.name,
            "step": self.step,
            "network": self.network.state_dict(),
            "kept": self.kept,
            "muon": self.muon.state_dict(),
            "adam": self.adam.state_dict(),
            "sight": self.sight.state_dict() if self.sight else {},
            "rows": self.rows.get_state(),
        }
        temporary = path.with_suffix(".tmp")
        torch.save(state, temporary)
        os.replace(temporary, path)

    def resume(self, path: Path) -> None:
        """Go on from a saved state. The text that follows is drawn afresh from a seed of that step."""
        state = torch.load(path, weights_only=True)
        self.step = state["step"]
        self.network.load_state_dict(state["network"])
        self.kept = state["kept"]
        self.muon.load_state_dict(state["muon"])
        self.adam.load_state_dict(state["adam"])
        if self.sight is not None:
            self.sight.load_state_dict(state["sight"])
        self.rows.set_state(state["rows"])
        self.maker.rng.seed(f"{self.maker.seed}-{self.step}")

    @contextmanager
    def _fast(self) -> Iterator[None]:
        """Fused elementwise operators, and bfloat16 matrix products where the processor has units for them."""
        matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
        before = matmul.fp32_precision
        matmul.fp32_precision = "bf16" if self.low_precision else before
        try:
            with use("compiled") if self.compiled else nullcontext():
                yield
        finally:
            matmul.fp32_precision = before

    def _mixtures(self) -> Iterator[Mixture]:
        done = 0
        for stage in self.recipe.stages:
            for i in range(stage.steps):
                if done + i >= self.step:
                    yield stage.mixture
            done += stage.steps

    def _look(self, samples: list[Sample]) -> list[tuple[Glimpse, Tensor]]:
        """What all pictures are to the network, [I / 4, D] each, in bfloat16 where products are."""
        glimpses = [glimpse for sample in samples for glimpse in sample.glimpses]
        if not glimpses:
            return []
        # In the order of their sizes: rows of one length are computed together.
        rows = [(i, grid, patch_IC) for i, one in enumerate(glimpses) for grid, patch_IC in _rows(one.media)]
        order = sorted(range(len(rows)), key=lambda number: len(rows[number][2]))
        grids = [rows[number][1] for number in order]
        patch_IC = torch.cat([rows[number][2] for number in order])
        # Whole multiples: the library prepares its products anew for every new shape.
        if missing := -patch_IC.shape[0] % PATCHES:
            patch_IC = F.pad(patch_IC, (0, 0, 0, missing))
            grids.append((1, 2, missing // 2))
        dtype = torch.bfloat16 if self.low_precision else torch.float32
        feature_IC = _in(dtype, self.network.vision, normalised(patch_IC, dtype), grids)
        image_ID = _in(dtype, self.network.projector, feature_IC).float()
        parts = image_ID.split([t * h * w // self.network.projector.merged for t, h, w in grids])
        found = dict(zip(order, parts, strict=False))
        seen: list[list[Tensor]] = [[] for _ in glimpses]
        for number, (i, _, _) in enumerate(rows):
            seen[i].append(found[number])
        return [(one, torch.cat(own)) for one, own in zip(glimpses, seen, strict=True)]

    def _with_images(self, batch: Batch, rows: list[Sample], images: list[tuple[Glimpse, Tensor]]) -> Batch:
        """The batch with its pictures, which are the first of them."""
        count = sum(len(row.glimpses) for row in rows)
        if not count:
            return batch
        place_I = self._is_media(batch.ids_T).nonzero()[:, 0]
        return batch.with_images(place_I, torch.cat([image_ID for _, image_ID in images[:count]]))

    def _is_media(self, ids_T: Tensor) -> Tensor:
        """Which tokens stand for pictures or videos."""
        config = self.network.config
        placeholders = [i for i in (config.image_id, config.video_id) if i is not None]
        return torch.isin(ids_T, torch.tensor(placeholders))

    def _language_losses(self, hidden_TD: Tensor, rows: list[Sample]) -> tuple[Tensor, Tensor, float, float | None]:
        """Mean next-token losses on some text and some answer tokens, and the share of the latter guessed right.

        The last value is this share among the answers about pictures alone, None without any.
        """
        target_T = torch.cat([F.pad(r.ids_T[1:], (0, 1), value=-1) for r in rows])
        answer_T = torch.cat([F.pad(r.answer_T[1:], (0, 1), value=False) for r in rows])
        text_S = (~answer_T & (target_T >= 0) & ~self._is_media(target_T)).nonzero()[:, 0]
        answer_S = answer_T.nonzero()[:, 0]
        count = int(target_T.shape[0] * self.recipe.loss_share)
        answer_S = answer_S[torch.randperm(answer_S.shape[0], generator=self.rows)[: count * 3 // 4]]
        text_S = text_S[torch.randperm(text_S.shape[0], generator=self.rows)[: count - answer_S.shape[0]]]
        split = answer_S.shape[0]
        token_S = torch.cat((answer_S, text_S))
        logit_SV = self.network.head(hidden_TD[token_S]).float()
        loss_S = F.cross_entropy(logit_SV, target_T[token_S], reduction="none")
        right_S = (logit_SV[:split].argmax(-1) == target_T[answer_S]).float()
        seen_S = torch.cat([torch.full_like(r.ids_T, int(r.seen)) for r in rows])[answer_S].bool()
        seen = right_S[seen_S].mean().item() if seen_S.any() else None
        return loss_S[split:].mean(), loss_S[:split].mean(), right_S.mean().item(), seen

    def _index_rows(self, row: Sample) -> Tensor:
        """Tokens whose index loss counts: half of them before answer tokens, the others anywhere."""
        count, length = self.recipe.index_rows, row.ids_T.shape[0]
        asked = row.answer_T[1:].nonzero()[:, 0]
        half = asked[torch.randperm(asked.shape[0], generator=self.rows)[: count // 2]]
        return torch.cat((half, torch.randint(0, length, (count - half.shape[0],), generator=self.rows)))

    def _average_gradients(self) -> None:
        """Mean gradients over the workers, in one transfer."""
        if not dist.is_initialized():
            return
        # Where one worker saw no picture others may have seen some.
        trained = [*self.network.parameters(), *(self.sight.parameters() if self.sight else [])]
        for p in trained:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        grads = [p.grad for p in trained if p.grad is not None]
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for grad, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
            grad.copy_(part.view_as(grad))

    def _update(self) -> None:
        rate = self.learning_rate()
        self.muon.param_groups[0]["lr"] = self.recipe.matrix_lr * rate
        self.adam.param_groups[0]["lr"] = self.recipe.vector_lr * rate
        nn.utils.clip_grad_norm_(self.adam.param_groups[0]["params"], 1.0)
        for optimiser in (self.muon, self.adam):
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)


def final_weights(state: dict[str, Any]) -> dict[str, Tensor]:
    """What a saved run is exported as: the mean of the kept weights, or the last ones if none were kept."""
    kept: list[tuple[int, dict[str, Tensor]]] = state["kept"] or [(1, state["network"])]
    total = sum(count for count, _ in kept)
    return {
        name: sum((count / total * weights[name] for count, weights in kept), start=torch.zeros(()))
        for name in state["network"]
    }


def _rows(media: Media) -> Iterator[tuple[Grid, Tensor]]:
    """The rows of its grids, each with its patches."""
    yield from zip(
        media.grids, torch.from_numpy(media.patch_IC).split([t * h * w for t, h, w in media.grids]), strict=True
    )


def _in(dtype: torch.dtype, module: nn.Module, *inputs: Any) -> Tensor:
    """What a module makes of inputs with its weights in a dtype; its own stay as they are, and get the gradients."""
    weights = {name: value.to(dtype) for name, value in module.named_parameters()}
    out: Tensor = torch.func.functional_call(module, weights, inputs)
    return out


def _split_parameters(network: Network) -> tuple[list[Tensor], list[Tensor]]:
    """Matrices inside the layers, for Muon; everything else, for AdamW."""
    matrices: list[Tensor] = []
    others: list[Tensor] = []
    routers = {id(p) for m in network.modules() if isinstance(m, Router) for p in m.parameters()}
    for name, p in network.named_parameters():
        inside = name.startswith(_INSIDE) and p.ndim >= 2 and id(p) not in routers
        (matrices if inside else others).append(p)
    return matrices, others
