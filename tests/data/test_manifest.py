from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from diffgap_lightning.data.manifest import (
    Block,
    Manifest,
    Shard,
    column_owner,
    manifest_from_json,
    merge_manifests,
    write_manifest,
)

SHARD = Shard("shard-000000.tar", 4096, (Block(0, 1024, (3, 3), 7), Block(1024, 1024, (2, 2), None)), "ab")
MANIFEST = Manifest(
    "pairs", {"audio": 4, "text": 5}, (SHARD,), "float32", "clap-1", "train", ("text_caption",), ("text",), 3
)


def test_round_trip(tmp_path) -> None:
    path = write_manifest(tmp_path, MANIFEST)
    assert manifest_from_json(path.read_text()) == MANIFEST
    assert MANIFEST.num_rows == {"audio": 5, "text": 5}
    assert [p.name for p in tmp_path.iterdir()] == ["manifest.json"]


def broken(path: list[Any], value: Any) -> str:
    record = json.loads(MANIFEST.to_json())
    at = record
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return json.dumps(record)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (["schema_version"], 99, "schema_version 99, this version reads 1 to 1; upgrade"),
        (["format"], "x", "no manifest of shards"),
        (["kind"], "triples", "kind 'triples'"),
        (["dtype"], "object", "'object'"),
        (["modalities", "audio", "dim"], -1, "modality 'audio'"),
        (["modalities", "audio", "dim"], 1 << 40, "modality 'audio'"),
        (["modalities", "audio", "rows"], 6, "states"),
        (["encoder"], 3, "encoder 3"),
        (["columns"], ["a.b/c"], "columns"),
        (["shards"], {}, "no list of shards"),
        (["shards", 0, "name"], "../x.tar", "plain file name"),
        (["shards", 0, "name"], "pipe:rm -rf x.tar", "plain file name"),
        (["shards", 0, "name"], "s3://b/x.tar", "plain file name"),
        (["shards", 0, "bytes"], 1e30, "the file was altered"),
        (["shards", 0, "blocks", 0], [0, 10**14, 7, 3, 3], "does not lie in a file of 4096 bytes"),
        (["shards", 0, "blocks", 0], [7, 512, 7, 3, 3], "does not lie in"),
        (["shards", 0, "blocks", 0], [0, 1024, 7, 3], "does not lie in"),
        (["shards", 0, "blocks", 0], [0, 1024, 7, 2000, 2000], "claims 2000 rows in 1024 bytes"),
        (["shards", 0, "blocks", 0], [0, 1024, 7, 3, 2], "unequal rows"),
        (["shards", 0, "blocks", 0], [0, 1024, 7, True, 3], "does not lie in"),
        (["shards", 0, "blocks"], 3, "shard record"),
    ],
)
def test_contradictions_are_refused_with_the_files_name(path: list[Any], value: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        manifest_from_json(broken(path, value), "here/manifest.json")
    assert str(caught.value).startswith("here/manifest.json")


def test_text_that_is_no_json() -> None:
    with pytest.raises(ValueError, match="not valid JSON"):
        manifest_from_json(MANIFEST.to_json()[:-30])
    with pytest.raises(ValueError, match="not valid JSON"):
        manifest_from_json("[" * 100_000)


def test_a_shard_listed_twice_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="lists a shard twice"):
        write_manifest(tmp_path, replace(MANIFEST, shards=(SHARD, SHARD)))


def test_merging_needs_one_kind_dimension_and_encoder() -> None:
    other = replace(MANIFEST, encoder=None, columns=(), seed=4)
    merged = merge_manifests([MANIFEST, other])
    assert (merged.num_rows["audio"], merged.encoder, merged.columns) == (10, "clap-1", ())
    for change, words in (({"encoder": "b"}, "different encoders: b, clap-1"), ({"dims": {"audio": 4}}, "dims")):
        with pytest.raises(ValueError, match=words):
            merge_manifests([MANIFEST, replace(MANIFEST, **change)])


def test_a_column_belongs_to_the_longest_modality_that_opens_its_name() -> None:
    assert column_owner("audio_clean_fold", ["audio", "audio_clean"]) == "audio_clean"
    assert column_owner("video_fold", ["audio"]) is None
