"""Generation metrics of a folder of clips: which extractor gives which figure, over which rows and pairs.

    fad      Frechet distance of VGGish's rows            fd   of one row a clip (PANNs, an encoder)
    kad      kernel audio distance, of any rows           kl   of the classes of clips with equal names
    is       inception score of the generated clips       clap cosine of each generated clip with its captions

Figures are comparable only with the same extractor, and the Frechet ones only at the same number of clips: from N rows
of D features with N <= D the covariance lacks directions and the distance is too large. KAD has no such bias.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffgap_lightning.evaluation.bootstrap import interval, resample_counts, resampled_means
from diffgap_lightning.evaluation.clip_folder import ClipFolder, Progress, extract, some
from diffgap_lightning.evaluation.features import FeatureExtractor, Features
from diffgap_lightning.functional.frechet import frechet_distance
from diffgap_lightning.functional.generation import (
    IS_SPLITS,
    clap_scores,
    inception_score,
    kernel_audio_distance,
    kl_divergences,
)

METRICS = ("fad", "fd", "kad", "kl", "is", "clap")
LESS_IS_BETTER = {"fad": True, "fd": True, "kad": True, "kl": True, "is": False, "clap": False}
Record = dict[str, Any]


class NotAvailable(ValueError):  # noqa: N818
    """A metric that cannot be had from the given files; the message is the reason."""


class NotMeasured(NotAvailable):
    """A metric that another kind of extractor gives."""


@dataclass(frozen=True)
class GenerationReport:
    """What was measured.

    Attributes:
        records: One a figure: metric, extractor, sha256, value, std, ci, n_generated, n_reference, note.
        skipped: Metric -> why there is no figure.
        failures: File -> why it could not be used.
    """

    records: list[Record]
    skipped: dict[str, str]
    failures: dict[str, str]


def evaluate_folders(
    generated: str | os.PathLike[str],
    reference: str | os.PathLike[str] | None,
    extractors: Sequence[FeatureExtractor],
    *,
    metrics: Sequence[str] | None = None,
    captions: Mapping[str, Sequence[str]] | None = None,
    splits: int = IS_SPLITS,
    error_budget: float = 0.05,
    progress: Progress | None = None,
) -> GenerationReport:
    """Measure a folder of generated clips.

    Args:
        generated: Folder of clips.
        reference: Folder of real ones, matched by name for KL; None leaves inception and CLAP score.
        extractors: Each gives the metrics that it can.
        metrics: Names out of `METRICS`; None: all that the rest allows.
        captions: Of the generated clips, by key, for the CLAP score.
        splits: Of the inception score.
        error_budget: The share of clips that may be unreadable, unpaired or without caption.
        progress: Wraps the batches, with a text.

    Raises:
        FileNotFoundError, ValueError: no such folder, fewer than two clips, more failures than the budget, or a metric
            that was asked for and cannot be had.
    """
    for name in metrics or ():
        if name not in METRICS:
            raise ValueError(f"metrics: got {name!r}, expected some of {', '.join(METRICS)}")
    if not extractors:
        raise ValueError("no feature extractor; give at least one")
    folders = [ClipFolder.open(generated)] + ([ClipFolder.open(reference)] if reference is not None else [])
    failures: dict[str, str] = {}
    records: list[Record] = []
    reasons: dict[str, str] = {}
    for extractor in extractors:
        sides = [_Side(folder.path, *extract(folder, extractor, error_budget, progress)) for folder in folders]
        failures |= {file: why for side in sides for file, why in side.failures.items()}
        study = _Study(extractor, sides[0], sides[1] if len(sides) > 1 else None, captions, splits, error_budget)
        for name in metrics or METRICS:
            try:
                records.append({"metric": name, "extractor": extractor.name, "sha256": extractor.sha256} | study(name))
            except NotMeasured as reason:
                reasons.setdefault(name, str(reason))
            except NotAvailable as reason:
                reasons[name] = str(reason)
    have = {record["metric"] for record in records}
    skipped = {name: why for name, why in reasons.items() if name not in have}
    if metrics is not None and skipped:
        name, why = next(iter(skipped.items()))
        raise ValueError(f"{name}: {why}")
    records.sort(key=lambda record: METRICS.index(record["metric"]))
    return GenerationReport(records, skipped, failures)


@dataclass(frozen=True)
class _Side:
    folder: Path
    keys: list[str]
    features: Features
    failures: dict[str, str]


@dataclass(frozen=True)
class _Study:
    """The metrics of one extractor; each method gives the rest of a record or raises `NotAvailable`."""

    extractor: FeatureExtractor
    generated: _Side
    reference: _Side | None
    captions: Mapping[str, Sequence[str]] | None
    splits: int
    budget: float

    def __call__(self, name: str) -> Record:
        measures: dict[str, Callable[[], Record]] = {
            "fad": self.frechet,
            "fd": self.frechet,
            "kad": self.kernel,
            "kl": self.kl,
            "is": self.inception,
            "clap": self.clap,
        }
        if name in ("fad", "fd") and name != self.extractor.frechet:
            raise NotMeasured("needs VGGish" if name == "fad" else "needs PANNs or an encoder: one row a clip")
        return {"std": None, "ci": None, "n_reference": None, "note": ""} | measures[name]()

    def frechet(self) -> Record:
        x, y = self._rows()
        few, dim = min(len(x), len(y)), x.shape[1]
        note = f"{few} rows <= {dim} dimensions: biased upwards, compare at equal numbers only" if few <= dim else ""
        return self._sizes(x, y) | {"value": frechet_distance(x, y), "note": note}

    def kernel(self) -> Record:
        x, y = self._rows()
        return self._sizes(x, y) | {"value": kernel_audio_distance(x, y)}

    def kl(self) -> Record:
        if self.reference is None:
            raise NotAvailable("needs a reference folder")
        ours, theirs = self.generated.features.logits, self.reference.features.logits
        if ours is None or theirs is None:
            raise NotMeasured("needs a classifier such as PANNs")
        place = {key: i for i, key in enumerate(self.reference.keys)}
        pairs = [(i, place[key]) for i, key in enumerate(self.generated.keys) if key in place]
        own = set(self.generated.keys)
        alone = [f"{self.generated.folder / key}" for key in self.generated.keys if key not in place]
        alone += [f"{self.reference.folder / key}" for key in self.reference.keys if key not in own]
        note = self._unmatched(alone, len(alone) + len(pairs), "pairs of equal names", "no partner in the other folder")
        left, right = (torch.tensor(side) for side in zip(*pairs, strict=True))
        values = kl_divergences(ours[left].double(), theirs[right].double())
        return self._mean(values, torch.arange(len(values))) | {"n_reference": len(values), "note": note}

    def inception(self) -> Record:
        logits = self.generated.features.logits
        if logits is None:
            raise NotMeasured("needs a classifier such as PANNs")
        if len(logits) < 2 * self.splits:
            raise NotAvailable(f"{len(logits)} clips for {self.splits} splits, expected at least {2 * self.splits}")
        value, std = inception_score(logits, self.splits)
        return {"value": value, "std": std, "n_generated": len(logits)}

    def clap(self) -> Record:
        if not self.extractor.knows_text:
            raise NotMeasured("needs an encoder of audio and text")
        if self.captions is None:
            raise NotAvailable("needs captions")
        pairs = [(i, text) for i, key in enumerate(self.generated.keys) for text in self._captions(key)]
        alone = [f"{self.generated.folder / key}" for key in self.generated.keys if not self._captions(key)]
        note = self._unmatched(alone, len(self.generated.keys), "clips with a caption", "no caption")
        texts = self.extractor.embed_captions([text for _, text in pairs])
        clip = torch.tensor([i for i, _ in pairs])
        values = clap_scores(self.generated.features.rows[clip], texts)
        return self._mean(values, clip) | {"n_generated": len(clip.unique()), "note": note}

    def _captions(self, key: str) -> Sequence[str]:
        """Of one clip; a table from Windows may write its folders with backslashes."""
        assert self.captions is not None
        return self.captions.get(key) or self.captions.get(key.replace("/", "\\"), ())

    def _rows(self) -> tuple[Tensor, Tensor]:
        if self.reference is None:
            raise NotAvailable("needs a reference folder")
        x, y = (side.features.rows.double() for side in (self.generated, self.reference))
        for side, rows in ((self.generated, x), (self.reference, y)):
            if len(rows) < 2:
                raise NotAvailable(f"{side.folder}: {len(rows)} rows, expected at least 2")
        return x, y

    def _sizes(self, x: Tensor, y: Tensor) -> Record:
        return {"n_generated": len(x), "n_reference": len(y)}

    def _mean(self, values: Tensor, clip: Tensor) -> Record:
        """Mean over pairs with its bootstrap interval over clips."""
        unit = clip.unique(return_inverse=True)[1]
        counts = resample_counts(int(unit.max()) + 1, 1000, torch.Generator().manual_seed(0))
        ci = interval(resampled_means(values, unit, counts))
        std = values.std(correction=0).item()
        return {"value": values.mean().item(), "std": std, "ci": ci, "n_generated": len(values)}

    def _unmatched(self, alone: list[str], total: int, expected: str, what: str) -> str:
        """A note about unmatched clips within the budget; more are refused."""
        if len(alone) > self.budget * total or len(alone) == total:
            raise NotAvailable(
                f"{len(alone)} of {total} clips have {what}: {some(alone)}; the metric takes {expected}, "
                f"error_budget allows {self.budget:.0%} without"
            )
        return f"{len(alone)} with {what}: {some(alone)}" if alone else ""
