"""`GenerationRun`: renders items one batch after the other into a `RunFolder`, and keeps its page up to date."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from diffgap_lightning.atomic import replacing
from diffgap_lightning.data.audio import audio_windows
from diffgap_lightning.data.media import Media, MediaError
from diffgap_lightning.data.mux import playable_suffix, write_video_with_audio, write_wav
from diffgap_lightning.generation.folder import PAGE_NAME, Record, RunFolder
from diffgap_lightning.generation.items import Item
from diffgap_lightning.generation.page import render_page
from diffgap_lightning.generation.rendering import Renderer, Sound
from diffgap_lightning.generation.spectrogram import spectrogram_pngs

_PAGE_SHARE = 0.1  # the page is written again when it lacks this share of the finished items


class GenerationRun:
    """Makes what is not finished yet.

    Args:
        renderer: What makes the sounds.
        folder: Where they go; it is prepared.
        title: Of the page.
        facts: Where the sounds come from (command, models, ...), printed on the page.
    """

    def __init__(self, renderer: Renderer, folder: RunFolder, title: str, facts: Mapping[str, object]) -> None:
        self.renderer, self.folder, self.title, self.facts = renderer, folder, title, dict(facts)
        self.failed: dict[str, str] = {}

    def run(self, items: Sequence[Item], progress: Callable[[Item], None] | None = None) -> list[Record]:
        """Make the items that have no record yet.

        Args:
            items: All that belong on the page.
            progress: Called with every item that is finished now.

        Returns:
            The records of the finished items, in the order of `items`. Videos that cannot be used are in `failed`.
        """
        records = {item.key: self.folder.record(item.key) for item in items}
        shown = -1
        try:
            for batch in self._batches([item for item in items if records[item.key] is None]):
                for item, record in zip(batch, self._make(batch), strict=True):
                    records[item.key] = record
                    if progress is not None:
                        progress(item)
                finished = [record for record in records.values() if record]
                if len(finished) * (1 - _PAGE_SHARE) > shown:
                    self.write_page(finished)
                    shown = len(finished)
        finally:
            finished = [record for record in records.values() if record]
            if finished:
                self.write_page(finished)
        return finished

    def write_page(self, records: Sequence[Record]) -> None:
        """Write the page of some records."""
        facts = self.facts | ({"could not be used": "; ".join(self.failed.values())} if self.failed else {})
        self.folder.write_text(PAGE_NAME, render_page(records, title=self.title, facts=facts))

    def _batches(self, items: Sequence[Item]) -> Iterator[list[Item]]:
        """Texts as many at a time as fill the generator's batch, videos one by one."""
        size = max(1, self.renderer.batch_size // self.renderer.settings.candidates)
        texts = [item for item in items if item.kind == "text"]
        for first in range(0, len(texts), size):
            yield texts[first : first + size]
        yield from ([item] for item in items if item.kind == "video")

    def _make(self, batch: list[Item]) -> list[Record | None]:
        if batch[0].kind == "video":
            return [self._make_video(item) for item in batch]
        found = self.renderer.texts([item.text for item in batch], [item.key for item in batch])
        return [self._write(item, sounds) for item, sounds in zip(batch, found, strict=True)]

    def _make_video(self, item: Item) -> Record | None:
        assert item.path is not None
        try:
            sounds = self.renderer.video_sounds(Media(item.path), item.key)
            return self._write(item, [*self._soundtrack(item), *sounds])
        except MediaError as error:
            self.failed[item.key] = f"{item.path.name}: {error}"
            return None

    def _soundtrack(self, item: Item) -> list[Sound]:
        """The video's own sound at the generator's rate, if it has one that can be decoded."""
        assert item.path is not None
        try:
            parts = [w for _, w in audio_windows(Media(item.path), self.renderer.generator.sample_rate)]
        except MediaError:
            return []
        return [Sound("original", [torch.cat(parts)], [{}], torch.zeros(0))]

    def _write(self, item: Item, sounds: Sequence[Sound]) -> Record:
        """Write an item's files, then its record."""
        rate = self.renderer.generator.sample_rate
        pictures = spectrogram_pngs([sound.waveforms[0] for sound in sounds], rate)
        versions = []
        for sound, png in zip(sounds, pictures, strict=True):
            version = self._write_sound(item, sound.version, sound.waveforms[0], rate)
            picture = f"spectrograms/{item.key}.{sound.version}.png"
            with replacing(self.folder.file(picture)) as work:
                work.write_bytes(png)
            rest = self._write_candidates(item, sound, rate)
            versions.append(version | {"picture": picture, "scores": sound.scores[0], "candidates": rest})
        record: Record = {
            "key": item.key,
            "kind": item.kind,
            "text": item.text,
            "seconds": len(sounds[-1].waveforms[0]) / rate,
            "conditions": _distance({sound.version: sound.conditions for sound in sounds}),
            "versions": versions,
        }
        self.folder.write_record(record)
        return record

    def _write_candidates(self, item: Item, sound: Sound, rate: int) -> list[Record]:
        """Write all but the best of a version's waveforms."""
        found = []
        for rank, (waveform, scores) in enumerate(zip(sound.waveforms[1:], sound.scores[1:], strict=True), start=2):
            name = f"candidates/{sound.version}/{item.key}.{rank}.wav"
            write_wav(self.folder.file(name), waveform, rate)
            found.append({"audio": name, "scores": scores})
        return found

    def _write_sound(self, item: Item, version: str, waveform: Tensor, rate: int) -> Record:
        """Write a version's waveform, and for a video the video with it."""
        stem = f"{version}/{item.key}"
        write_wav(self.folder.file(f"{stem}.wav"), waveform, rate)
        record: Record = {"name": version, "audio": f"{stem}.wav"}
        if item.path is not None:
            name = f"{stem}{playable_suffix(item.path)}"
            write_video_with_audio(self.folder.file(name), item.path, waveform, rate)
            record["video"] = name
        return record


def _distance(conditions: Mapping[str, Tensor]) -> float | None:
    """Mean cosine between what the two versions were conditioned on; None with one version."""
    before = conditions.get("plain", conditions.get("regression"))
    after = conditions.get("refined")
    if before is None or after is None:
        return None
    return float(torch.cosine_similarity(before, after, dim=1).mean())
