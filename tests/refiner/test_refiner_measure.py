"""Refiners of other data: unequal dimensions, three modalities, default pairs, bounded numbers of pairs."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from diffgap_lightning.refiner import DiffGAPRefiner

TA = {"source": "text", "target": "audio"}
AT = {"source": "audio", "target": "text"}
DIM = 16


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_modalities_of_different_dimension(rows, excite) -> None:
    x, ids = rows(dims={"text": 10, "audio": DIM})
    refiner = excite(DiffGAPRefiner.measure(x, ids, rank="full", width=16, depth=1))
    assert {"ridge", "cca"} <= set(refiner.bridges) <= {"ridge", "restored", "cca", "procrustes"}
    assert refiner.refine(x["text"][:4], **TA, generator=generator()).shape == (4, DIM)
    assert refiner.refine(x["audio"][:4], **AT, num_samples=2, generator=generator()).shape == (4, 2, 10)
    assert refiner.score(x["text"][:4], x["audio"][:7], **TA).shape == (4, 7)
    refiner.calibrate(x, ids)
    torch.testing.assert_close(
        refiner.config.restore["text->audio"] ** 2 * refiner.start_energy(x["text"], **TA).mean(), torch.tensor(1.0)
    )
    for options in ({"start": "source"}, {"strength": 0.4}, {"strength": 0.0}):
        with pytest.raises(ValueError, match=r"text \(10-d\) onto audio \(16-d\).*start='posterior_mean'") as error:
            refiner.refine(x["text"][:4], **TA, **options)
        assert "\n" not in str(error.value)


def test_three_modalities_and_several_pairs(rows, excite) -> None:
    x, ids = rows(n=90, dims={"text": DIM, "audio": DIM, "video": 12})
    ids["audio"] = ids["audio"].repeat_interleave(2)  # two clips for every text
    x["audio"] = normalize(x["audio"].repeat_interleave(2, 0) + 0.05 * torch.randn(180, DIM, generator=generator()))
    pairs = [("text", "audio"), ("video", "audio")]
    refiner = excite(DiffGAPRefiner.measure(x, ids, pairs, width=16, depth=1))
    assert refiner.directions == (("text", "audio"), ("audio", "text"), ("video", "audio"), ("audio", "video"))
    for source, target in refiner.directions:
        y = refiner.refine(x[source][:3], source=source, target=target, generator=generator())
        assert y.shape == (3, refiner.config.dims[target])
    before = refiner.config.fusion
    refiner.calibrate(x, ids)
    assert set(refiner.config.fusion) == set(before) == {"text->audio", "video->audio"}
    assert set(refiner.config.restore) == {"->".join(d) for d in refiner.directions}
    with pytest.raises(ValueError, match="source='text', target='video': this refiner knows text->audio, audio->text"):
        refiner.refine(x["text"], source="text", target="video")


def test_what_no_pair_names_is_not_measured(rows, quick) -> None:
    x, ids = rows(n=40, dims=dict.fromkeys(("text", "audio", "video"), DIM))
    assert set(DiffGAPRefiner.measure(x, ids, [("text", "audio")], width=8).config.dims) == {"text", "audio"}


@pytest.mark.parametrize(
    ("modalities", "pairs"),
    [
        (("audio", "text"), (("text", "audio"),)),
        (("audio", "video", "text"), (("text", "audio"), ("video", "audio"))),
        (("video", "text"), (("text", "video"),)),
    ],
)
def test_the_default_pairs_end_in_audio(rows, quick, modalities, pairs) -> None:
    x, ids = rows(n=40, dims=dict.fromkeys(modalities, DIM))
    assert DiffGAPRefiner.measure(x, ids, width=8, depth=0).config.pairs == pairs


def test_a_bounded_number_of_pairs_is_always_the_same(rows, quick) -> None:
    closed = [
        DiffGAPRefiner.measure(*rows(), width=8, depth=0, max_pairs=k).cdm_of("text", "audio").closed_form.weight
        for k in (60, 60, 1000)
    ]
    assert torch.equal(closed[0], closed[1])
    assert not torch.equal(closed[0], closed[2])
