"""What is broken or hostile: nothing executes, losses are counted and named, and the budget decides when to stop."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from diffgap_lightning.data.losses import Loss, LossLedger, ShardError, ShardLossError
from diffgap_lightning.data.manifest import Block, Manifest, Shard, write_manifest
from diffgap_lightning.data.plan import TrainPlan
from diffgap_lightning.data.shard_index import open_shards
from diffgap_lightning.data.shard_reader import BlockReader
from diffgap_lightning.data.shard_verify import verify_shards
from diffgap_lightning.data.stream import TrainStream
from diffgap_lightning.data.stream_loader import TrainLoader
from diffgap_lightning.data.webdataset_module import WebDatasetDataModule
from diffgap_lightning.functional.pairs import hash_ids


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.marker,))


def bomb_npy(marker: Path) -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([Bomb(marker)], dtype=object), allow_pickle=True)
    return file.getvalue()


def fix_block_crc(folder: Path, shard: int, block: int) -> None:
    """What an attacker does: the manifest agrees with the altered bytes."""
    path = folder / "manifest.json"
    record = json.loads(path.read_text())
    data = (folder / record["shards"][shard]["name"]).read_bytes()
    offset, size, *_ = record["shards"][shard]["blocks"][block]
    record["shards"][shard]["blocks"][block][2] = zlib.crc32(data[offset : offset + size])
    path.write_text(json.dumps(record))


def truncate(folder: Path) -> str:
    path = folder / "shard-000001.tar"
    path.write_bytes(path.read_bytes()[:700])
    return "truncated: the file has 700 bytes"


def remove(folder: Path) -> str:
    (folder / "shard-000001.tar").unlink()
    return "the file is missing"


def empty(folder: Path) -> str:
    (folder / "shard-000001.tar").write_bytes(b"")
    return "truncated: the file has 0 bytes"


def flip(folder: Path) -> str:
    path = folder / "shard-000001.tar"
    data = bytearray(path.read_bytes())
    data[1200] ^= 1
    path.write_bytes(data)
    return "altered: its CRC-32 differs"


def foreign(folder: Path) -> str:
    path = folder / "shard-000001.tar"
    with tarfile.open(path, "w") as tar:
        for name in ("000000.evil.pyd", "000000.model.pth", "../../escape.npy"):
            data = pickle.dumps(Bomb(folder / "executed"))
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    fix_block_crc(folder, 1, 0)
    return "lacks audio.npy"


def replace_member(folder: Path, name: str, data: bytes) -> None:
    """Replace one member of the first block of shard 1 by other bytes of the same length, CRC-32 included."""
    path = folder / "shard-000001.tar"
    content = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        member = tar.getmember(name)
    assert len(data) <= member.size
    content[member.offset_data : member.offset_data + member.size] = data.ljust(member.size, b"\0")
    path.write_bytes(content)
    fix_block_crc(folder, 1, 0)


def object_array(folder: Path) -> str:
    replace_member(folder, "000000.audio.npy", bomb_npy(folder / "executed"))
    return "holds Python objects, which are never unpickled"


def huge_header(folder: Path) -> str:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (10**13, 6)})
    replace_member(folder, "000000.audio.npy", header.getvalue())
    return "the header claims shape (10000000000000, 6)"


def not_a_number(folder: Path) -> str:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<U1", "fortran_order": False, "shape": (16, 6)})
    replace_member(folder, "000000.audio.npy", header.getvalue() + b"\xff" * 384)
    return "expected (16, 6) floating"


DAMAGES = [truncate, remove, empty, flip, foreign, object_array, huge_header, not_a_number]


@pytest.fixture
def loader(shards: Callable) -> Callable[..., TrainLoader]:
    def make(folder: Path, budget: float, rank: int = 0, world: int = 1) -> TrainLoader:
        found = open_shards(folder)
        plan = TrainPlan(found.manifest.block_rows[:, 0], 8, world=world, window_rows=16)
        return TrainLoader(TrainStream(found, plan, rank), LossLedger("train", plan.total, budget, rank))

    return make


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_run_completes_within_the_budget_and_stops_beyond_it(
    shards: Callable, loader: Callable, damage: Callable
) -> None:
    folder = shards(96, count=6)
    reason = damage(folder)
    tolerant = loader(folder, 0.2)
    with pytest.warns(UserWarning, match=r"end of epoch 0: train: 16 of 96 rows lost \(16.67%\) on rank 0") as told:
        batches = list(tolerant)
    assert reason in str(told[0].message)
    assert "shard-000001.tar block 0" in str(told[0].message)
    assert [len(b["audio"]) for b in batches] == [8] * 12
    assert len({i for b in batches for i in b["audio_id"].tolist()}) == 80
    assert all(torch.isfinite(b["audio"]).all() for b in batches)
    with pytest.raises(ShardLossError, match=r"shard-000001.tar block 0.*error_budget=0.1.*diffgap shards verify"):
        list(loader(folder, 0.1))
    assert not (folder / "executed").exists()
    assert not (folder.parent.parent / "escape.npy").exists()


def test_a_loss_is_met_and_counted_once_over_epochs_and_told_once(
    shards: Callable, loader: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shards(96, count=6)
    remove(folder)
    stream, read, met = loader(folder, 0.2), BlockReader.read, []
    monkeypatch.setattr(BlockReader, "read", lambda self, index: (met.append(index), read(self, index))[1])
    with pytest.warns(UserWarning, match="lost") as told:
        assert len([batch for _ in range(3) for batch in stream]) == 36
    assert (len(told), stream.ledger.lost_rows, met.count(1)) == (1, 16, 1)


def test_ranks_see_the_same_batches_again_after_a_loss(shards: Callable, loader: Callable) -> None:
    """Replacing lost rows is part of the plan: a resumed run meets the same replacement."""
    folder = shards(96, count=6)
    truncate(folder)
    with pytest.warns(UserWarning, match="lost"):
        whole = [b["audio_id"].tolist() for b in loader(folder, 0.2)]
    again = loader(folder, 0.2)
    again.load_state_dict(loader(folder, 0.2).state_dict() | {"position": 5})
    with pytest.warns(UserWarning, match="lost"):
        assert [b["audio_id"].tolist() for b in again] == whole[5:]


def test_when_nothing_can_be_read_it_says_so(shards: Callable, loader: Callable) -> None:
    folder = shards(32, count=2)
    for path in folder.glob("*.tar"):
        path.unlink()
    with pytest.raises(
        ShardLossError, match=r"no block can be read; the first: shard-00000\d.tar block 0: the file is missing"
    ):
        list(loader(folder, 1.0))


def test_what_is_left_of_a_block_is_all_read_when_its_first_sample_is_lost(
    tar: Callable, tmp_path: Path, table: Callable
) -> None:
    source = table(6)
    members = {f"k{i}.{m}.npy": source.embeddings[m][i].numpy() for i in range(6) for m in ("audio", "text")}
    members |= dict.fromkeys(("k0.text.npy", "k3.text.npy"), np.full(4, np.nan, np.float32))
    found = open_shards(tar(tmp_path / "c.tar", members))
    plan = TrainPlan(found.manifest.block_rows[:, 0], 6)
    with pytest.warns(UserWarning, match="2 of 6 rows lost"):
        (batch,) = TrainLoader(TrainStream(found, plan), LossLedger("train", 6, 0.5))
    counts = Counter(batch["audio_id"].tolist())
    assert sorted(counts) == sorted(hash_ids([f"k{i}" for i in (1, 2, 4, 5)]).tolist())
    assert sorted(counts.values()) == [1, 1, 2, 2]


def test_classic_tars_lose_single_samples(classic: Callable, tar: Callable, tmp_path: Path, table: Callable) -> None:
    source, marker = table(20), tmp_path / "executed"
    members: dict[str, object] = {}
    for i in range(20):
        members |= {f"k{i:02d}.{m}.npy": source.embeddings[m][i].numpy() for m in ("audio", "text")}
    members["k03.audio.npy"] = bomb_npy(marker)
    members["k04.audio.npy"] = np.full(6, np.nan, np.float32)
    members["k05.text.npy"] = np.ones(4, np.float32)
    members["k06.text.npy"] = np.eye(4, dtype=np.float32)
    del members["k07.text.npy"]
    members |= {"k07.text.pyd": pickle.dumps(Bomb(marker)), "k07.text.pth": pickle.dumps(Bomb(marker))}
    path = tar(tmp_path / "c.tar", members)
    found = open_shards(path)
    plan = TrainPlan(found.manifest.block_rows[:, 0], 5)
    with pytest.warns(UserWarning, match="5 of 20 rows lost") as told:
        batches = list(TrainLoader(TrainStream(found, plan), LossLedger("train", 20, 0.3)))
    message = str(told[0].message)
    for words in (
        "'k03': audio.npy: holds Python objects",
        "'k07': lacks text.npy",
        "'k06': text.npy: got (4, 4)",
        "NaN",
        "L2 norm",
    ):
        assert words in message
    assert [len(b["audio"]) for b in batches] == [5] * 4
    counts = Counter(i for b in batches for i in b["audio_id"].tolist())
    assert len(counts) == 15
    assert max(counts.values()) == 2  # each lost row is replaced by another one
    assert not marker.exists()
    module = WebDatasetDataModule(predict=str(path), num_workers=0, batch_size=6, error_budget=0.3)
    module.setup()
    with pytest.warns(UserWarning, match="5 of 20 rows lost"):
        rows = [
            (r, i)
            for b in module.predict_dataloader()
            for r, i in zip(b["text_row"].tolist(), b["text_id"].tolist(), strict=True)
        ]
    assert rows == [(r, int(hash_ids([f"k{r:02d}"]))) for r in range(20) if r not in range(3, 8)]


def test_a_sample_with_a_repeated_member_is_lost_and_its_neighbours_are_not(tmp_path: Path, classic: Callable) -> None:
    (path,) = classic(3)
    with tarfile.open(path) as tar:
        members = [(m, tar.extractfile(m).read()) for m in tar]
    with tarfile.open(path, "w") as tar:
        for number in (0, 1, 2, 3, 2, 4, 5):  # s0001.audio.npy a second time
            tar.addfile(members[number][0], io.BytesIO(members[number][1]))
    data = BlockReader(open_shards(path), extras=True).read(0)
    assert data.arrays["audio_id.str"].tolist() == ["s0000", "s0002"]
    assert [str(loss) for loss in data.losses] == ["000.tar sample 's0001': audio.npy is there twice"]


def test_a_sparse_member_that_claims_gigabytes_is_passed_over(tmp_path: Path, tar: Callable) -> None:
    row = np.eye(4, dtype=np.float32)
    path = tar(
        tmp_path / "x.tar", {"a.audio.npy": row[0], "a.text.npy": row[1], "b.audio.npy": row[2], "b.text.npy": row[3]}
    )
    content = bytearray(path.read_bytes())
    with tarfile.open(path) as file:
        at = file.getmember("b.audio.npy").offset
    header = bytearray(content[at : at + 512])
    header[156:157] = tarfile.GNUTYPE_SPARSE
    header[257:265] = b"ustar  \0"
    header[386 : 386 + 24] = b"%011o\0" % 0 + b"%011o\0" % 144
    header[483:495] = b"%011o\0" % (8 * 10**9)
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header)
    content[at : at + 512] = header
    path.write_bytes(content)
    found = open_shards(path)
    assert found.manifest.num_rows == {"audio": 2, "text": 2}
    data = BlockReader(found).read(0)
    assert len(data.arrays["audio"]) == 1
    assert "lacks audio.npy" in data.losses[0].reason


def test_pairs_that_were_shifted_against_each_other_are_refused(tmp_path: Path, tar: Callable) -> None:
    """A foreign block shard without checksums: values and pairing are looked at."""
    eye = np.eye(4, dtype=np.float32)
    good = {
        "000000.audio.npy": eye,
        "000000.audio_id.npy": np.arange(4),
        "000000.text.npy": eye,
        "000000.text_id.npy": np.arange(4),
    }
    for number, (change, words) in enumerate(
        [
            ({}, None),
            (
                {
                    "000000.evil.pyd": b"MZ",
                    "000000.w.pth": pickle.dumps(Bomb(tmp_path / "executed")),
                    "000000.x.npy": eye,
                },
                None,
            ),
            ({"000000.text_id.npy": np.arange(4)[::-1]}, "ids of audio, text differ"),
            ({"000000.text.npy": 3 * eye}, "L2 norm"),
            ({"000000.text.npy": eye[:, :3]}, r"text: got \(4, 3\)"),
            ({"000000.text_id.npy": np.arange(4.0)}, "expected .* integers or strings"),
            ({"000001.text_id.npy": np.arange(4)}, "a second text_id.npy in one block"),
        ]
    ):
        folder = tmp_path / str(number)
        path = tar(folder / "x.tar", good | change)
        block = Block(0, path.stat().st_size - 1024, (4, 4))
        write_manifest(
            folder, Manifest("pairs", {"audio": 4, "text": 4}, (Shard("x.tar", path.stat().st_size, (block,)),))
        )
        reader = BlockReader(open_shards(folder))
        if words is None:
            np.testing.assert_array_equal(reader.read(0).arrays["text"], eye)
        else:
            with pytest.raises(ShardError, match=words):
                reader.read(0)


def test_string_ids_in_foreign_blocks_are_hashed(tmp_path: Path, tar: Callable) -> None:
    names, eye = np.array(["a", "b", "c"]), np.eye(3, dtype=np.float32)
    path = tar(tmp_path / "x.tar", {"0.audio.npy": eye, "0.audio_id.npy": names})
    shard = Shard("x.tar", path.stat().st_size, (Block(0, path.stat().st_size - 1024, (3,)),))
    write_manifest(tmp_path, Manifest("rows", {"audio": 3}, (shard,)))
    np.testing.assert_array_equal(BlockReader(open_shards(tmp_path)).read(0).arrays["audio_id"], hash_ids(names))


def test_evaluation_allows_no_loss_and_prediction_does(shards: Callable) -> None:
    folder = shards(96, count=6, name="val")
    flip(folder)
    module = WebDatasetDataModule(val=str(folder), predict=str(folder), num_workers=0, batch_size=8, error_budget=0.5)
    module.setup()
    with pytest.raises(ShardLossError, match=r"val: 16 of 96 rows lost"):
        list(module.val_dataloader())
    with pytest.warns(UserWarning, match="all rows read: predict: 16 of 96 rows lost"):
        rows = [i for b in module.predict_dataloader() for i in b["audio_row"].tolist()]
    assert rows == [i for i in range(96) if not 16 <= i < 32]
    with pytest.raises(ShardLossError, match="val: 16 of 96"):
        module.rows("val")


def test_losses_in_worker_processes_reach_the_ledger(shards: Callable) -> None:
    folder = shards(96, count=6)
    flip(folder)
    module = WebDatasetDataModule(train=str(folder), num_workers=2, batch_size=8, error_budget=0.2)
    module.setup()
    loader = module.train_dataloader()
    with pytest.warns(UserWarning, match="16 of 96 rows lost"):
        assert len(list(loader)) == 12
    module.teardown("fit")
    strict = WebDatasetDataModule(train=str(folder), num_workers=2, batch_size=8)
    strict.setup()
    with pytest.raises(ShardLossError, match="shard-000001.tar block 0: altered"):
        list(strict.train_dataloader())
    strict.teardown("fit")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncate, "shard-000001.tar: truncated: 700 of"),
        (remove, "shard-000001.tar: missing"),
        (empty, "shard-000001.tar: truncated: 0 of"),
        (
            flip,
            "shard-000001.tar: altered: its SHA-256 differs from the manifest's; 1 of 1 blocks cannot be read",
        ),
        (foreign, "shard-000001.tar: altered"),
        (object_array, "shard-000001.tar: altered"),
    ],
)
def test_verify_names_each_problem(shards: Callable, damage: Callable, words: str) -> None:
    folder = shards(96, count=6)
    assert verify_shards(folder) == []
    damage(folder)
    problems = verify_shards(folder)
    assert len(problems) == 1
    assert words in problems[0]


def test_verify_finds_what_is_too_much(shards: Callable) -> None:
    folder = shards(32, count=2)
    (folder / "shard-000009.tar").write_bytes((folder / "shard-000001.tar").read_bytes())
    (folder / ".shard-000010.tar.tmp").touch()
    with (folder / "shard-000000.tar").open("ab") as file:
        file.write(b"more")
    assert [p.partition(":")[0] for p in verify_shards(folder)] == [
        "shard-000000.tar",
        "shard-000009.tar",
        ".shard-000010.tar.tmp",
    ]


def test_ledger() -> None:
    ledger = LossLedger("train", 100, 0.1)
    ledger.add([Loss("a.tar", "block 0", 10, "x")] * 3)
    assert ledger.lost_rows == 10
    with pytest.raises(
        ShardLossError, match=r"train: 11 of 100 rows lost \(11.00%\) on rank 0: a.tar block 0: x; b.tar"
    ):
        ledger.add([Loss("b.tar", "sample 'k'", 1, "y")])
    with pytest.raises(ValueError, match="between 0 and 1"):
        LossLedger("train", 100, 1.5)
