"""Diffusion priors of other packages behind one interface: trained with early stopping, sampled by their conventions.

    DALLE2Prior        DALLE2-pytorch's DiffusionPrior: unit rows scaled by sqrt(D), cosine schedule of 1000 steps, x0
                       prediction, 64 sampling steps, no guidance by default
    UnCLIPPrior        diffusers' PriorTransformer and UnCLIPScheduler: rows standardised (`clip_mean`, `clip_std`), x0
                       prediction clipped at 5, 25 steps, guidance 4 by convention
    ResidualMLPPrior   three residual MLP blocks that denoise target rows without a condition; sampling starts from the
                       *source* row noised to t = 0.5: the setting of Diffusion-Link (arXiv 2510.11330) as its abstract
                       tells it, not its code

A prior learns one direction, `condition -> target`, both `(N, D)` unit rows. No text tokens exist here, only pooled
embeddings: the transformers are built without places for them, which makes both rivals several times faster than their
defaults with 256 or 77 empty tokens.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Pairs = tuple[Tensor, Tensor]
unit = nn.functional.normalize


class Prior(nn.Module):
    """One direction's generative model."""

    steps: int
    guidance: tuple[float, ...] = (1.0,)

    def measure(self, condition: Tensor, target: Tensor) -> None:
        """Take what is needed from the training rows before training."""

    def loss(self, condition: Tensor, target: Tensor) -> Tensor:
        """Training loss of a batch; draws from the global generator."""
        raise NotImplementedError

    def draw(self, condition: Tensor, guidance: float) -> Tensor:
        """One sample a row, `(B, D)`, not normalised; draws from the global generator."""
        raise NotImplementedError

    @torch.no_grad()
    def sample(self, condition: Tensor, guidance: float = 1.0, seed: int = 0, chunk: int = 256) -> Tensor:
        """One unit sample a row; the global generator is left as it was."""
        self.eval()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return torch.cat([unit(self.draw(part, guidance), dim=1) for part in condition.split(chunk)])


class DALLE2Prior(Prior):
    """DALLE2-pytorch's DiffusionPrior on embeddings."""

    steps = 64

    def __init__(self, dim: int, depth: int = 6, heads: int = 8, ff_mult: float = 4, tokens: int = 0) -> None:
        super().__init__()
        import dalle2_pytorch.dalle2_pytorch as package

        package.tqdm = lambda steps, **_: steps  # a bar for every batch would drown the table
        network = package.DiffusionPriorNetwork(
            dim=dim, depth=depth, heads=heads, dim_head=64, ff_mult=ff_mult, max_text_len=tokens
        )
        self.prior = package.DiffusionPrior(
            network,
            image_embed_dim=dim,
            timesteps=1000,
            sample_timesteps=self.steps,
            cond_drop_prob=0.2,
            condition_on_text_encodings=False,
        )

    def loss(self, condition: Tensor, target: Tensor) -> Tensor:
        """The package's own."""
        # The package scales `image_embed` in place: it must not be the caller's.
        return self.prior(text_embed=condition, image_embed=target.clone())

    def draw(self, condition: Tensor, guidance: float) -> Tensor:
        """64 DDIM steps of the package, eta 1."""
        cond = {"text_embed": condition}
        return self.prior.p_sample_loop(condition.shape, text_cond=cond, cond_scale=guidance, timesteps=self.steps)


class UnCLIPPrior(Prior):
    """diffusers' PriorTransformer sampled with UnCLIPScheduler."""

    steps = 25
    guidance = (1.0, 4.0)

    def __init__(self, dim: int, heads: int = 32, depth: int = 20, drop: float = 0.1) -> None:
        super().__init__()
        from diffusers import PriorTransformer, UnCLIPScheduler

        self.network = PriorTransformer(
            heads, 64, depth, embedding_dim=dim, num_embeddings=0, encoder_hid_proj_type=None
        )
        self.scheduler = UnCLIPScheduler(
            variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=5.0
        )
        self.drop, self.scale = drop, math.sqrt(dim)

    def measure(self, condition: Tensor, target: Tensor) -> None:
        """Fill `clip_mean` and `clip_std`."""
        self.network.clip_mean.data.copy_(target.mean(0, keepdim=True))
        self.network.clip_std.data.copy_(target.std(0, keepdim=True).clamp(min=1e-4))
        self.network.clip_mean.requires_grad_(False)
        self.network.clip_std.requires_grad_(False)

    def loss(self, condition: Tensor, target: Tensor) -> Tensor:
        """Squared error of x0; a tenth of the conditions is dropped."""
        x0 = (target - self.network.clip_mean) / self.network.clip_std
        t = torch.randint(0, 1000, (len(x0),))
        alpha_bar = self.scheduler.alphas_cumprod[t, None]
        x_t = alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * torch.randn_like(x0)
        kept = condition * (torch.rand(len(x0), 1) >= self.drop)
        return nn.functional.mse_loss(self._predict(x_t, t, kept), x0)

    def draw(self, condition: Tensor, guidance: float) -> Tensor:
        """As in diffusers' unCLIP pipeline."""
        self.scheduler.set_timesteps(self.steps)
        x, times = torch.randn_like(condition), self.scheduler.timesteps
        for i, t in enumerate(times):
            x0 = self._predict(x, t, condition)
            if guidance != 1:
                nothing = self._predict(x, t, torch.zeros_like(condition))
                x0 = nothing + guidance * (x0 - nothing)
            previous = times[i + 1] if i + 1 < len(times) else None
            x = self.scheduler.step(x0, int(t), x, None if previous is None else int(previous)).prev_sample
        return self.network.post_process_latents(x)

    def _predict(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        return self.network(x, t, self.scale * condition).predicted_image_embedding


class ResidualMLPPrior(Prior):
    """Denoises target rows; a noised source row is where it starts."""

    steps = 10
    start = 0.5

    def __init__(self, dim: int, width: int = 512, depth: int = 3) -> None:
        super().__init__()
        self.inputs = nn.Linear(dim + 2, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
            for _ in range(depth)
        )
        self.output = nn.Linear(width, dim)
        self.scale = math.sqrt(dim)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Estimate x0 from `x` `(B, D)` at times `t` `(B,)`."""
        angle = t[:, None] * math.pi / 2
        h = self.inputs(torch.cat([x, angle.cos(), angle.sin()], dim=1))
        for block in self.blocks:
            h = h + block(h)
        return self.output(h)

    def loss(self, condition: Tensor, target: Tensor) -> Tensor:
        """x0 from a noised target row, and from its own noised source row: what sampling starts from."""
        x0, t = self.scale * target, torch.rand(len(target))
        angle, noise = t[:, None] * math.pi / 2, torch.randn_like(target)
        estimates = [self(angle.cos() * self.scale * rows + angle.sin() * noise, t) for rows in (target, condition)]
        return sum(nn.functional.mse_loss(e, x0) for e in estimates) / 2

    def draw(self, condition: Tensor, guidance: float) -> Tensor:
        """DDIM from the noised condition."""
        times = torch.linspace(self.start, 0, self.steps + 1) * math.pi / 2
        x = times[0].cos() * self.scale * condition + times[0].sin() * torch.randn_like(condition)
        for now, then in zip(times[:-1], times[1:], strict=True):
            x0 = self(x, (now * 2 / math.pi).expand(len(x)))
            x = then.cos() * x0 + then.sin() * (x - now.cos() * x0) / now.sin()
        return x


@dataclass
class Training:
    """How every prior is trained: AdamW, averaged weights, early stopping on the same validation rows.

    Attributes:
        seconds: Of this process's own CPU time, which other programs' load does not change; includes validation.
        learning_rate: After 50 steps of warm-up.
        batch_size: Pairs.
        patience: Validations without a better loss.
        validations: About one validation after so many seconds is made of the budget.
        weight_decay: Of AdamW.
        decay: Of the averaged weights, a step.
    """

    seconds: float
    learning_rate: float = 3e-4
    batch_size: int = 128
    patience: int = 5
    validations: int = 40
    weight_decay: float = 0.01
    decay: float = 0.99


def train_prior(prior: Prior, train: Pairs, val: Pairs, how: Training, seed: int) -> dict[str, float]:
    """Train and keep the averaged weights of the best validation.

    Returns:
        `train_seconds` of CPU time, `pairs_seen`, `stopped_early`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        prior.measure(*train)
        averaged = copy.deepcopy(prior).requires_grad_(False)
        optimizer = torch.optim.AdamW(
            [p for p in prior.parameters() if p.requires_grad], how.learning_rate, weight_decay=how.weight_decay
        )
        best, least, waited, seen, next_look = copy.deepcopy(averaged.state_dict()), math.inf, 0, 0, 0.0
        begun, stopped = time.process_time(), False
        for step, (condition, target) in enumerate(_batches(train, how.batch_size)):
            prior.train()
            for group in optimizer.param_groups:
                group["lr"] = how.learning_rate * min(1.0, (step + 1) / 50)
            optimizer.zero_grad()
            prior.loss(condition, target).backward()
            nn.utils.clip_grad_norm_(prior.parameters(), 1.0)
            optimizer.step()
            seen += len(condition)
            decay = min(how.decay, (1 + step) / (10 + step))
            for mean, value in zip(averaged.parameters(), prior.parameters(), strict=True):
                mean.lerp_(value, 1 - decay)
            spent = time.process_time() - begun
            if spent >= next_look or spent >= how.seconds:
                next_look = spent + how.seconds / how.validations
                loss = _validation_loss(averaged, val)
                waited = 0 if loss < least else waited + 1
                if loss < least:
                    best, least = copy.deepcopy(averaged.state_dict()), loss
                stopped = waited >= how.patience
                if stopped or spent >= how.seconds:
                    break
        prior.load_state_dict(best)
        prior.eval()
    return {"train_seconds": time.process_time() - begun, "pairs_seen": seen, "stopped_early": stopped}


@torch.no_grad()
def _validation_loss(prior: Prior, val: Pairs) -> float:
    """With the same noise at every look."""
    prior.eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts = [(len(c), float(prior.loss(c, t))) for c, t in zip(val[0].split(256), val[1].split(256), strict=True)]
    return sum(n * loss for n, loss in parts) / sum(n for n, _ in parts)


def _batches(pairs: Pairs, batch_size: int) -> Iterator[Pairs]:
    """Shuffled batches without end."""
    size = min(batch_size, len(pairs[0]))
    while True:
        order = torch.randperm(len(pairs[0]))
        for chosen in order[: len(order) // size * size].split(size):
            yield pairs[0][chosen], pairs[1][chosen]
