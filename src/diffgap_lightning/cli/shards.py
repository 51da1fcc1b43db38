"""`diffgap shards pack | verify | info | unpack | index`: block shards from tables and tars, and back."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from diffgap_lightning.cli.arguments import ArgumentParser, one_line


def run(argv: list[str]) -> int:
    """Run one of the subcommands; 1 means that `verify` found problems."""
    arguments = _parser().parse_args(argv)
    return int(arguments.run(arguments))


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="diffgap shards", description="Pack embeddings into shards, and look after them.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="pack|verify|info|unpack|index")
    add = commands.add_parser("pack", help="write block shards from a table, other shards, or a folder of .npy arrays")
    add.add_argument("source", help="table (.npz, .safetensors), shards (folder, tars, glob) or folder of .npy arrays")
    add.add_argument("folder", help="where the shards go; with fractions: its subfolders train, val, test")
    add.add_argument("--kind", choices=("pairs", "rows"), help="default: pairs; rows for val and test")
    add.add_argument("--val-fraction", type=float, default=0.0, metavar="F", help="share of the ids for val")
    add.add_argument("--test-fraction", type=float, default=0.0, metavar="F", help="share of the ids for test")
    add.add_argument("--rows-per-block", type=int, default=4096, metavar="N")
    add.add_argument("--rows-per-shard", type=int, default=262_144, metavar="N")
    add.add_argument("--dtype", choices=("float16", "float32"), default="float16")
    add.add_argument("--seed", type=int, default=0, metavar="N", help="of the split and of the order of pairs")
    add.add_argument("--encoder", help="fingerprint of the model that made the rows; default: the source's own")
    add.add_argument("--overwrite", action="store_true", help="replace shards that are already there")
    add.set_defaults(run=_pack)
    add = commands.add_parser("verify", help="find missing, truncated, altered and extra shards")
    add.add_argument("shards", nargs="+", help="folders of shards")
    add.set_defaults(run=_verify)
    add = commands.add_parser("info", help="print what shards hold")
    add.add_argument("shards", help="a folder of shards, tar files or a glob")
    add.add_argument("--json", action="store_true", help="as JSON")
    add.set_defaults(run=_info)
    add = commands.add_parser("unpack", help="read shards into a table")
    add.add_argument("shards", help="a folder of shards, tar files or a glob")
    add.add_argument("table", help="the .npz or .safetensors file to write")
    add.add_argument("--max-rows", type=int, metavar="N", help="a random sample of at most N rows a modality")
    add.add_argument("--seed", type=int, default=0, metavar="N", help="of the sample")
    add.set_defaults(run=_unpack)
    add = commands.add_parser(
        "index", help="write a manifest beside classic tars (key.<modality>.npy), for fast starts"
    )
    add.add_argument("shards", help="tar files in one folder, e.g. 'FOLDER/*.tar'")
    add.add_argument("--modalities", nargs="+", metavar="NAME", help="default: all .npy members of the first sample")
    add.set_defaults(run=_index)
    return parser


def _pack(arguments: argparse.Namespace) -> int:
    from diffgap_lightning.data.packing import pack

    with tqdm(unit=" rows", unit_scale=True, desc="pack", file=sys.stderr, disable=None) as bar:
        written = pack(
            arguments.source,
            arguments.folder,
            kind=arguments.kind,
            val_fraction=arguments.val_fraction,
            test_fraction=arguments.test_fraction,
            seed=arguments.seed,
            encoder=arguments.encoder,
            progress=bar.update,
            rows_per_block=arguments.rows_per_block,
            rows_per_shard=arguments.rows_per_shard,
            dtype=arguments.dtype,
            overwrite=arguments.overwrite,
        )
    for name, manifest in written.items():
        folder = f"{arguments.folder}/{name}".rstrip("/")
        print(f"{folder}: {_describe(manifest)}")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from diffgap_lightning.data.shard_index import open_shards
    from diffgap_lightning.data.shard_verify import verify_shards

    status = 0
    for folder in arguments.shards:
        manifest = open_shards(folder).manifest
        total = sum(shard.size for shard in manifest.shards)
        with tqdm(total=total, unit="B", unit_scale=True, desc="verify", file=sys.stderr, disable=None) as bar:
            problems = verify_shards(folder, bar.update)
        for problem in problems:
            print(one_line(f"{folder}: {problem}"))
        print(f"{folder}: {f'{len(problems)} problems' if problems else 'all good'}; {_describe(manifest)}")
        status = max(status, int(bool(problems)))
    return status


def _info(arguments: argparse.Namespace) -> int:
    from diffgap_lightning.data.shard_index import open_shards

    manifest = open_shards(arguments.shards).manifest
    fields: dict[str, Any] = {
        "kind": manifest.kind,
        "split": manifest.split,
        "rows": manifest.num_rows,
        "dims": dict(manifest.dims),
        "dtype": manifest.dtype,
        "encoder": manifest.encoder,
        "columns": list(manifest.columns),
        "shards": len(manifest.shards),
        "blocks": sum(len(shard.blocks) for shard in manifest.shards),
        "bytes": sum(shard.size for shard in manifest.shards),
        "seed": manifest.seed,
    }
    if arguments.json:
        print(json.dumps(fields, indent=2))
    else:
        for name, value in fields.items():
            text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
            print(f"{name:<8} {', '.join(text) if isinstance(text, list) else '-' if text is None else text}")
    return 0


def _unpack(arguments: argparse.Namespace) -> int:
    from diffgap_lightning.atomic import check_replaceable
    from diffgap_lightning.data.arrays import check_suffix
    from diffgap_lightning.data.shard_table import read_embedding_shards

    check_suffix(Path(arguments.table))
    check_replaceable(arguments.table)
    table = read_embedding_shards(arguments.shards, max_rows=arguments.max_rows, seed=arguments.seed)
    table.write(arguments.table)
    print(f"{arguments.table}: {', '.join(f'{n} {m} rows' for m, n in table.num_rows.items())}")
    return 0


def _index(arguments: argparse.Namespace) -> int:
    from diffgap_lightning.data.manifest import write_manifest
    from diffgap_lightning.data.shard_index import index_shards
    from diffgap_lightning.data.urls import expand_braces, expand_glob, is_remote

    urls = [url for text in expand_braces(arguments.shards) for url in expand_glob(text)]
    folders = {url.rpartition("/")[0] or "." for url in urls}
    if len(folders) != 1 or is_remote(urls[0]):
        raise ValueError(
            f"{arguments.shards}: expected tars in one local folder, beside which a manifest can be written"
        )
    shards = index_shards(urls, arguments.modalities)
    if shards.losses:
        raise ValueError(f"{shards.losses[0]}; copy that tar again, or leave it out")
    path = write_manifest(folders.pop(), shards.manifest)
    print(f"{path}: {_describe(shards.manifest)}")
    return 0


def _describe(manifest: Any) -> str:
    rows = ", ".join(f"{n} {m} ({manifest.dims[m]}-d)" for m, n in manifest.num_rows.items())
    return f"{rows} in {len(manifest.shards)} shards, kind {manifest.kind}, {manifest.dtype}"
