"""The refiner's own loss beside a generator's: what keeps it a model of p(target | source) while it is fine-tuned.

    loss = generator's loss(condition = one-step estimate of the refiner)  +  weight * pair_loss

The generator's loss pulls the refined embedding towards whatever this generator decodes best; the denoising loss on the
batch's own pairs, in both directions as in training from scratch (BST), keeps it where real target embeddings lie.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diffgap_lightning.diffusion.guidance import keep_condition
from diffgap_lightning.losses import denoising_loss, noise_rows, stratified_times
from diffgap_lightning.refiner import DiffGAPRefiner


def pair_loss(
    refiner: DiffGAPRefiner,
    source_rows: Tensor,
    target_rows: Tensor,
    *,
    source: str = "text",
    target: str = "audio",
    generator: torch.Generator | None = None,
    share_of_noise: float = 0.25,
    condition_dropout: float = 0.1,
) -> Tensor:
    """Denoising loss of aligned pairs, averaged over both directions.

    Args:
        refiner: Its networks get the gradients.
        source_rows: `(B, D)` embeddings of modality `source`.
        target_rows: `(B, D_target)` embeddings of modality `target`, row for row.
        source: A modality of the refiner.
        target: The other.
        generator: Source of times, noise and condition dropout, on its own device.
        share_of_noise: Share of the rows that train the posterior mean.
        condition_dropout: Share of the rows that train the unconditional model.

    Returns:
        A scalar.

    Raises:
        ValueError: rows that do not pair up, or a direction that the refiner does not have.
    """
    if len(source_rows) != len(target_rows):
        raise ValueError(
            f"pairs: got {len(source_rows)} rows of {source} and {len(target_rows)} of {target}, expected as many"
        )
    device = refiner.space.mean(source).device
    z = {
        m: refiner.space.encode(nn.functional.normalize(x.detach().to(device, torch.float32), dim=1), m)
        for m, x in ((source, source_rows), (target, target_rows))
    }
    size, first = len(source_rows), noise_rows(len(source_rows), share_of_noise)
    where = device if generator is None else generator.device
    total = torch.zeros((), device=device)
    for a, b in ((source, target), (target, source)):
        cdm, x0 = refiner.cdm_of(a, b), z[b]
        t = stratified_times(size, share_of_noise, generator, where).to(device)
        eps = torch.randn(x0.shape, generator=generator, device=where).to(device)
        keep = keep_condition(size, condition_dropout, generator, where).to(device)
        keep[:first] = True
        x_t = cdm.schedule.add_noise(x0, eps, t)
        x_t[:first] = 0.0  # the posterior mean's input: no signal at all
        total = total + denoising_loss(cdm(x_t, t, z[a], keep), x0, cdm.schedule.log_snr(t))
    return total / 2


def trained_parameters(refiner: DiffGAPRefiner, source: str, target: str, both: bool) -> list[nn.Parameter]:
    """What a joint step reaches: the direction's network and, with the pair loss, the reverse one and its rest.

    Args:
        refiner: The refiner.
        source: Modality of the generator's embeddings.
        target: Modality that they are refined to.
        both: Whether `pair_loss` is added.
    """
    directions = [(source, target), (target, source)] if both else [(source, target)]
    found = []
    for direction in directions:
        for name, parameter in refiner.cdm_of(*direction).network.named_parameters():
            if both or name != "no_condition":  # learned where the condition is dropped
                found.append(parameter)
    return found
