"""Is an encoder what it claims to be? Each check measures one thing and says what to do if it fails.

    vocabulary      tokens of the tokenizer = tokens that the network knows (a broken one has five, without an error)
    prompts         two different texts do not give one vector
    collapse        mean cosine between different items; some public checkpoints map everything to one vector
    unit norm       largest deviation of a row's length from 1
    determinism     the same items twice, one of them longer than the encoder's window
    batch           items together = items alone
    sample rate     a sound from files of other rates lands where it lands at the encoder's own, misread ones do not
    bf16, fp16      smallest cosine between rows in float32 and under autocast

`check_at_load` runs those of text, which take milliseconds; `run_checks` (and `diffgap encoders check`) runs all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffgap_lightning.encoders.base import ContrastiveEncoder, unit
from diffgap_lightning.encoders.file_rates import rate_cosines
from diffgap_lightning.encoders.probes import TEXTS, probe

COLLAPSED = 0.98  # mean cosine between different items; usable encoders stay below 0.9
_SAME = 0.9999
_HALVES = 2  # items in half precision, which processors are slow in


@dataclass(frozen=True)
class Check:
    """What one check found.

    Attributes:
        modality: Of what.
        name: See the module's docstring.
        value: What was measured, for people.
        limit: What it should be.
        ok: Whether it is.
        advice: What to do if it is not.
    """

    modality: str
    name: str
    value: str
    limit: str
    ok: bool
    advice: str

    def raise_if_failed(self, who: str) -> None:
        """Turn a failure into an error.

        Raises:
            ValueError: it failed.
        """
        if not self.ok:
            raise ValueError(
                f"{who}: {self.modality} {self.name} is {self.value}, expected {self.limit}; {self.advice}"
            )


def check_vocabulary(tokens: int, known: int, tokenizer: str) -> None:
    """Refuse a tokenizer that does not belong to the network.

    Raises:
        ValueError: it has another number of tokens.
    """
    vocabulary(tokens, known).raise_if_failed(f"tokenizer {tokenizer}")


def check_at_load(encoder: ContrastiveEncoder) -> None:
    """The checks that take milliseconds: vocabulary, prompts, collapse and norm of texts.

    Raises:
        ValueError: one of them failed.
    """
    if "text" not in encoder.modalities:
        return
    for check in text_checks(encoder, encoder.embed_text(TEXTS)):
        check.raise_if_failed(encoder.fingerprint)


def run_checks(encoder: ContrastiveEncoder, modalities: Sequence[str] | None = None) -> Iterator[Check]:
    """All checks, one after the other.

    Args:
        encoder: In evaluation mode, on its device.
        modalities: Of these alone.

    Raises:
        ValueError: a modality that the encoder does not have.
    """
    for modality in modalities or encoder.modalities:
        if modality not in encoder.modalities:
            raise ValueError(f"modality {modality!r}: the encoder has {', '.join(encoder.modalities)}")
        items = _items(encoder, modality)
        rows = encoder.embed(modality, items)
        if modality == "text":
            yield from text_checks(encoder, rows)
        else:
            yield from (unit_norm(modality, rows), collapse(modality, rows))
        yield from repeatability(encoder, modality)
        if modality == "audio":
            yield sample_rates(encoder)
        exact = encoder.embed(modality, items[:_HALVES])
        for dtype in (torch.bfloat16, torch.float16):
            yield precision(encoder, modality, items[:_HALVES], exact, dtype)


def text_checks(encoder: ContrastiveEncoder, rows: Tensor) -> Iterator[Check]:
    """Vocabulary, prompts, collapse and norm, of the rows of `TEXTS`."""
    if encoder.vocabulary is not None:
        yield vocabulary(*encoder.vocabulary)
    yield prompts(rows)
    yield unit_norm("text", rows)
    yield collapse("text", rows)


def vocabulary(tokens: int, known: int) -> Check:
    """Tokens of the tokenizer against rows of the network's embedding, of which some networks have a few to spare."""
    advice = (
        "the tokenizer's files are missing or of another model: put vocab.json and merges.txt, or tokenizer.json, into "
        "a folder and give that folder"
    )
    return Check("text", "vocabulary", f"{tokens} tokens", f"{known} tokens", 0.99 * known <= tokens <= known, advice)


def prompts(rows: Tensor) -> Check:
    """The largest cosine between two different texts."""
    cosine = float((_off_diagonal(rows)).max())
    advice = (
        "different texts give one vector: the tokenizer is broken or the checkpoint is not loaded; see docs/encoders.md"
    )
    return Check("text", "prompts", f"cosine {cosine:.5f}", f"below {_SAME}", cosine < _SAME, advice)


def collapse(modality: str, rows: Tensor) -> Check:
    """The mean cosine between different items."""
    cosine = float(_off_diagonal(rows).mean())
    advice = "the space has collapsed to one vector: use another checkpoint, nothing can be told apart in this one"
    ok = cosine < COLLAPSED
    return Check(modality, "collapse", f"mean cosine {cosine:.3f}", f"below {COLLAPSED}", ok, advice)


def unit_norm(modality: str, rows: Tensor) -> Check:
    """The largest deviation of a row's length from 1; NaN fails."""
    deviation = float((rows.norm(dim=1) - 1).abs().max())
    advice = "rows must be finite and of unit norm: look for NaN in the weights, or normalise what embed_* returns"
    return Check(modality, "unit norm", f"off by {deviation:.1e}", "below 1e-3", deviation < 1e-3, advice)


def repeatability(encoder: ContrastiveEncoder, modality: str) -> Iterator[Check]:
    """Items together against the same once more, and against items alone; one is longer than the window."""
    items = _items(encoder, modality, long=True)
    together, again = (encoder.embed(modality, items) for _ in range(2))
    alone = torch.cat([encoder.embed(modality, [item]) for item in items])
    limit = _tolerance(together)
    for name, rows, advice in (
        ("determinism", again, "two calls differ: is a random crop or dropout left (call .eval())?"),
        (
            "batch",
            alone,
            "a row depends on its neighbours in the batch: padding is not masked, or a normalisation is in training "
            "mode",
        ),
    ):
        difference = float((together - rows).abs().max())
        yield Check(modality, name, f"{difference:.1e}", f"below {limit:.0e}", difference < limit, advice)


def sample_rates(encoder: ContrastiveEncoder) -> Check:
    """A sound decoded from files of other rates against the same sound at the encoder's own."""
    try:
        return sample_rate(*rate_cosines(encoder))
    except ImportError as error:
        return Check("audio", "sample rate", "not measured", str(error), True, "")


def sample_rate(decoded: Tensor, misread: Tensor) -> Check:
    """Cosines to a sound at the encoder's rate: of files of other rates, and of their samples taken as they are.

    The first must be near 1, and less than half as far from it as the second: in some spaces a sound of three times the
    pitch and a third of the length still has a cosine of 0.98.
    """
    cosine, wrong = float(decoded.min()), float(misread.max())
    ok = cosine > 0.95 and bool((1 - decoded < (1 - misread) / 2).all())
    value, limit = f"cosine {cosine:.4f} (misread {wrong:.4f})", "above 0.95, twice as near as misread"
    advice = "resampling is broken, or the network takes its audio at another rate than the encoder's sample_rate"
    return Check("audio", "sample rate", value, limit, ok, advice)


def precision(
    encoder: ContrastiveEncoder, modality: str, items: Sequence[Any], exact: Tensor, dtype: torch.dtype
) -> Check:
    """The smallest cosine between rows in float32 and under autocast to `dtype`."""
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    advice = f"{name} loses too much here: embed with --precision 32-true"
    try:
        with torch.autocast(exact.device.type, dtype):
            rough = encoder.embed(modality, items)
    except RuntimeError as error:
        return Check(modality, name, f"not possible on {exact.device.type}", str(error)[:60], True, advice)
    cosine = float((unit(exact) * unit(rough)).sum(dim=1).min())
    return Check(modality, name, f"cosine {cosine:.4f}", "above 0.99", cosine > 0.99, advice)


def _items(encoder: ContrastiveEncoder, modality: str, long: bool = False) -> Any:
    """Probes after the encoder's transform; with `long`, three of them, one longer than the window."""
    items: Any = probe(modality, encoder.sample_rate)
    if modality == "text":
        return [*items[:3], " ".join(items)] if long else items
    if long:
        items = list(items[:3])
        if modality == "audio" and encoder.window is not None:
            size = round(1.7 * encoder.window * (encoder.sample_rate or 0))
            items[2] = items[1].repeat(size // len(items[1]) + 1)[:size]
    transform = encoder.transform(modality)
    return [item if transform is None else transform(item) for item in items]


def _off_diagonal(rows: Tensor) -> Tensor:
    rows = unit(rows)
    cosines = rows @ rows.T
    return cosines[~torch.eye(len(rows), dtype=torch.bool, device=rows.device)]


def _tolerance(rows: Tensor) -> float:
    """Convolutions and matrix products of accelerators round differently from batch to batch."""
    return 1e-5 if rows.device.type == "cpu" else 5e-3
