"""How a pair's rows are dealt into folds: whole ids, or rows where ids are classes."""

from __future__ import annotations

import torch

from diffgap_lightning.refiner.closed_forms import held_out


def test_whole_ids_are_held_out_once_and_rows_without_a_partner_never() -> None:
    source, target = torch.tensor([0, 0, 1, 2, 3, 4, 5, 90]), torch.tensor([5, 4, 3, 2, 1, 0, 80, 81])
    held_count = [torch.zeros(8), torch.zeros(8)]
    for kept, held in held_out(source, target, 3):
        assert not set(source[held[0]].tolist()) & set(source[kept[0]].tolist())
        assert set(source[held[0]].tolist()) == set(target[held[1]].tolist())
        for side in (0, 1):
            assert torch.equal(kept[side], ~held[side])
            held_count[side] += held[side]
    assert held_count[0].tolist() == [1] * 7 + [0]
    assert held_count[1].tolist() == [1] * 6 + [0, 0]


def test_of_classes_rows_are_held_out_and_every_prompt_stays() -> None:
    prompts, clips = torch.arange(4), torch.arange(4).repeat_interleave(25)
    seen = torch.zeros(100)
    for kept, held in held_out(prompts, clips, 5):
        assert kept[0].all()
        assert held[0].all()
        assert int(held[1].sum()) == 20
        assert torch.equal(kept[1], ~held[1])
        seen += held[1]
    assert (seen == 1).all()


def test_the_folds_depend_on_the_seed_alone_and_are_no_more_than_there_are_ids() -> None:
    ids = torch.arange(30)
    one, two, other = ([h[0] for _, h in held_out(ids, ids, 5, seed=s)] for s in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert len(list(held_out(ids[:3], ids[:3], 5))) == 3
