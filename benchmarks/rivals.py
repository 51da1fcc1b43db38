"""DiffGAP beside its rivals on equal terms: the same training pairs, validation rows, test rows and seeds.

    pip install 'diffgap-lightning[rivals]'                   in an environment of its own: it wants open-clip-torch<3
    python benchmarks/rivals.py world --pairs 20000           the synthetic world
    python benchmarks/rivals.py DATA_DIR/audiocaps_dev.npz    an embedding table with columns `<modality>_fold`
    python benchmarks/rivals.py --full-defaults               size and speed of the priors exactly as shipped

Rivals: every bridge; DALLE2-pytorch's DiffusionPrior and diffusers' PriorTransformer + UnCLIPScheduler (`priors.py`),
each large and at about our size, with guidance off and as usual, and with DALLE2's choice of the better of two samples
by cosine to the condition; a Diffusion-Link-like residual MLP (audio to text only).

Equal terms
    pairs    all train on the same rows; priors and refiner stop on the same validation rows and keep the best weights.
             Bridges, which need no validation rows, are fitted on both.
    budget   a prior may use `--seconds` of CPU time (default 240), more than the refiner needs; pairs seen are printed
             beside it. The large ones may not have converged within it on a CPU: the log says who stopped early.
    PriorTransformer's default, 1.0e9 parameters, does not train on a CPU at all: in its place stand 6 layers 512 wide,
             about as large as DiffusionPrior's default, and `--full-defaults` times the original.

Columns
    R@1, R@5, R@10  of cos(produced - mean, gallery - mean), the same for everybody, with the produced rows as queries
                    (>) and as gallery (<); `fused` R@1 is a method's own score where it has one
    cosine          produced to true; MMD^2 x 1000 and Frechet distance between produced rows and the test rows
    seconds, us     CPU time of training, and of refining a row in batches of 64, medians of three interleaved rounds
                    (one round where a batch takes more than 2 s)
Intervals resample ids; those of differences are paired. They do not speak for other training seeds.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import yaml
from torch import Tensor, nn

from diffgap_lightning.bridges import Bridge, default_bridges
from diffgap_lightning.cli.trainer import fit
from diffgap_lightning.data import EmbeddingTable, SyntheticDataModule
from diffgap_lightning.evaluation.bootstrap import interval, resample_counts, resampled_means
from diffgap_lightning.evaluation.report import write_json
from diffgap_lightning.functional.gap import frechet_distance, mmd2
from diffgap_lightning.functional.pairs import pair_indices
from diffgap_lightning.functional.retrieval import retrieval_ranks
from diffgap_lightning.refiner import DiffGAPRefiner
from priors import DALLE2Prior, Pairs, Prior, ResidualMLPPrior, Training, UnCLIPPrior, train_prior
from real_clap import hold_out, splits, with_units

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
FORWARD, BACKWARD = ("text", "audio"), ("audio", "text")
TIMED_ROWS = 64
Record = dict[str, Any]
Refine = Callable[[Tensor], Tensor]
unit = nn.functional.normalize


@dataclass
class Fitted:
    """A method after training: how it refines, in each direction and variant, and what it cost.

    Attributes:
        refine: (direction, variant) -> rows `(B, D)` to produced unit rows `(B, D)`.
        score: The model with `score_features`, if its own score differs from the cosine of what it produces.
        parameters: Trained ones.
        stored: Numbers that it keeps, trained or measured.
        cost: `train_seconds`, `pairs_seen`, `stopped_early`.
    """

    refine: dict[tuple[tuple[str, str], str], Refine]
    score: Bridge | DiffGAPRefiner | None
    parameters: int
    stored: int
    cost: dict[str, float]


Fit = Callable[[EmbeddingTable, EmbeddingTable, int], Fitted]


def fit_bridge(make: Callable[[], Bridge], train: EmbeddingTable, val: EmbeddingTable, seed: int) -> Fitted:
    both = {m: torch.cat([train.embeddings[m], val.embeddings[m]]) for m in train.modalities}
    ids = {m: torch.cat([train.ids[m], val.ids[m]]) for m in train.modalities}
    begun = time.process_time()
    bridge = make().fit(both, ids)
    seconds = time.process_time() - begun
    refine: dict[tuple[tuple[str, str], str], Refine] = {
        (d, ""): lambda x, d=d: bridge.refine(x, source=d[0], target=d[1]) for d in (FORWARD, BACKWARD)
    }
    stored = sum(b.numel() for b in bridge.buffers())
    return Fitted(refine, bridge, 0, stored, {"train_seconds": seconds, "pairs_seen": 0, "stopped_early": False})


def fit_diffgap(config: str, train: EmbeddingTable, val: EmbeddingTable, seed: int) -> Fitted:
    """`diffgap fit` with a shipped configuration; both directions are trained."""
    begun = time.process_time()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        values = {
            "data": "diffgap_lightning.data.EmbeddingDataModule",
            "data.path": train.write(Path(folder, "train.npz")),
            "data.val_path": val.write(Path(folder, "val.npz")),
            "data.test_fraction": 0,
            "seed_everything": seed,
            "model.seed": seed,
            "trainer.default_root_dir": folder,
            "trainer.logger": "false",
            "trainer.enable_progress_bar": "false",
            "trainer.enable_model_summary": "false",
        }
        if config == "table":
            del values["data"]
        fit([f"--config={CONFIGS / config}.yaml", *(f"--{name}={value}" for name, value in values.items())])
        refiner = DiffGAPRefiner.from_pretrained(Path(folder, "refiner"))
        seconds = time.process_time() - begun
        steps = torch.load(Path(folder, "checkpoints", "last.ckpt"), weights_only=True)["global_step"]
        run_config = yaml.safe_load(Path(folder, "config.yaml").read_text(encoding="utf-8"))
    pairs = steps * run_config["data"]["init_args"]["batch_size"]
    cost = {"train_seconds": seconds, "pairs_seen": pairs, "stopped_early": True}
    refine: dict[tuple[tuple[str, str], str], Refine] = {}
    for d in (FORWARD, BACKWARD):
        for variant, choices in (("", {}), ("from noise", {"strength": 1.0})):
            refine[d, variant] = lambda x, d=d, c=choices: refiner.refine(
                x, source=d[0], target=d[1], generator=torch.Generator().manual_seed(0), **c
            )
    trained = sum(p.numel() for p in refiner.parameters())
    stored = trained + sum(b.numel() for b in refiner.buffers())
    return Fitted(refine, refiner, trained, stored, cost)


def fit_prior(
    make: Callable[[int], Prior],
    direction: tuple[str, str],
    how: Training,
    train: EmbeddingTable,
    val: EmbeddingTable,
    seed: int,
) -> Fitted:
    prior = seeded(lambda: make(train.dims[direction[1]]), seed)
    cost = train_prior(prior, paired(train, direction), paired(val, direction), how, seed)
    refine: dict[tuple[tuple[str, str], str], Refine] = {}
    for g in prior.guidance:
        variant = "" if g == prior.guidance[0] else f"guidance {g:g}"
        refine[direction, variant] = lambda x, g=g: prior.sample(x, g)
    if isinstance(prior, DALLE2Prior):
        refine[direction, "best of 2"] = lambda x: best_of_two(prior, x)
    size = sum(p.numel() for p in prior.parameters())
    return Fitted(refine, None, size, size, cost)


def best_of_two(prior: Prior, condition: Tensor) -> Tensor:
    """Of two samples, the one with the larger cosine to the condition: DALLE2's choice."""
    samples = torch.stack([prior.sample(condition, seed=s) for s in (0, 1)], dim=1)
    chosen = torch.einsum("bsd,bd->bs", samples, condition).argmax(1)  # b rows, s samples, d dimensions
    return samples[torch.arange(len(samples)), chosen]


def seeded(make: Callable[[], Prior], seed: int) -> Prior:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def paired(table: EmbeddingTable, direction: tuple[str, str]) -> Pairs:
    """All positive pairs `(P, D)`, `(P, D)`."""
    i, j = pair_indices(table.ids[direction[0]], table.ids[direction[1]])
    return table.embeddings[direction[0]][i], table.embeddings[direction[1]][j]


def methods(config: str, seconds: float, batch_size: int) -> dict[str, Fit]:
    """Name -> how it is fitted."""

    def prior(make: Callable[[int], Prior], rate: float, direction: tuple[str, str] = FORWARD) -> Fit:
        how = Training(seconds, rate, batch_size)
        return lambda train, val, seed: fit_prior(make, direction, how, train, val, seed)

    found: dict[str, Fit] = {
        name: lambda train, val, seed, make=make: fit_bridge(make, train, val, seed)
        for name, make in default_bridges().items()
    }
    found["diffgap"] = lambda train, val, seed: fit_diffgap(config, train, val, seed)
    return found | {
        "DiffusionPrior, small": prior(lambda dim: DALLE2Prior(dim, depth=1, heads=2, ff_mult=1), 3e-4),
        "DiffusionPrior, default": prior(DALLE2Prior, 3e-4),
        "PriorTransformer, small": prior(lambda dim: UnCLIPPrior(dim, heads=4, depth=1), 3e-4),
        "PriorTransformer, 6 layers": prior(lambda dim: UnCLIPPrior(dim, heads=8, depth=6), 3e-4),
        "Diffusion-Link-like": prior(ResidualMLPPrior, 3e-4, BACKWARD),
    }


@dataclass
class Pool:
    """Figures of one method, direction and variant, over folds and seeds."""

    hits: dict[str, list[Tensor]] = field(default_factory=dict)  # per query
    units: dict[str, list[Tensor]] = field(default_factory=dict)  # the query's id, for the bootstrap
    means: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, values: Tensor, units: Tensor) -> None:
        """Add one value a query."""
        self.hits.setdefault(name, []).append(values.double())
        self.units.setdefault(name, []).append(units)

    def measure(
        self, model: Fitted, key: tuple[tuple[str, str], str], train: EmbeddingTable, test: EmbeddingTable
    ) -> None:
        """Add what one fitted method produces from the test rows."""
        (source, target), variant = key
        query, gallery = test.embeddings[source], test.embeddings[target]
        q_ids, g_ids = test.ids[source], test.ids[target]
        produced = model.refine[key](query)
        mean = train.embeddings[target].mean(0)
        pairs = [("", unit(produced - mean), unit(gallery - mean))]
        if model.score is not None and not variant:
            features = [
                model.score.score_features(test.embeddings[m], modality=m, source=source, target=target)
                for m in (source, target)
            ]
            pairs.append(("fused ", *features))
        for prefix, a, b in pairs:
            for sign, q, g, qi, gi in ((">", a, b, q_ids, g_ids), ("<", b, a, g_ids, q_ids)):
                best = retrieval_ranks(q, g, qi, gi).best
                for k in (1, 5, 10):
                    self.add(f"{prefix}r{k}{sign}", best <= k, qi)
        i, j = pair_indices(q_ids, g_ids)
        self.add("cosine", torch.cosine_similarity(produced[i], gallery[j]), q_ids[i])
        distances = {"mmd2": mmd2(produced, gallery), "frechet": frechet_distance(produced, gallery, "ledoit-wolf")}
        costs = {"parameters": model.parameters, "stored": model.stored, **model.cost}
        for name, value in {**distances, **costs}.items():
            self.means.setdefault(name, []).append(float(value))

    def draws(self, name: str, counts: Tensor) -> Tensor:
        """The mean in every bootstrap replicate."""
        return resampled_means(torch.cat(self.hits[name]), torch.cat(self.units[name]), counts)


def time_refining(models: dict[str, Fitted], rows: EmbeddingTable, pools: dict[Any, Pool], rounds: int = 3) -> None:
    """CPU microseconds a row of every method and variant, interleaved."""
    spent: dict[Any, list[float]] = {}
    for _ in range(rounds):
        for name, model in models.items():
            for key, refine in model.refine.items():
                batch = rows.embeddings[key[0][0]][:TIMED_ROWS]
                if spent.get((name, *key), [0])[0] * len(batch) > 2:
                    continue
                begun = time.process_time()
                refine(batch)
                spent.setdefault((name, *key), []).append((time.process_time() - begun) / len(batch))
    for key, seconds in spent.items():
        pools[key].means.setdefault("refine_us", []).append(1e6 * median(seconds))


def run(
    folds: Iterator[tuple[EmbeddingTable, EmbeddingTable, EmbeddingTable]],
    fits: dict[str, Fit],
    seeds: list[int],
) -> dict[Any, Pool]:
    """Fit and measure everything; (method, direction, variant) -> figures."""
    pools: dict[Any, Pool] = {}
    for number, (train, val, test) in enumerate(folds):
        for seed in seeds:
            models = {}
            for name, make in fits.items():
                models[name] = model = make(train, val, seed)
                for key in model.refine:
                    pools.setdefault((name, *key), Pool()).measure(model, key, train, test)
                cost = ", ".join(f"{k} {v:g}" for k, v in model.cost.items())
                print(f"  split {number}, seed {seed}: {name}: {model.parameters:,} parameters, {cost}", flush=True)
            time_refining(models, test, pools)
    return pools


def records_of(pools: dict[Any, Pool], num_ids: int, replicates: int) -> list[Record]:
    counts = resample_counts(num_ids, replicates, torch.Generator().manual_seed(0))
    records = []
    for (name, (source, target), variant), pool in pools.items():
        record: Record = {"method": name, "variant": variant, "source": source, "target": target}
        record |= {k: float(torch.cat(v).mean()) for k, v in pool.hits.items()}
        record |= {k: sum(v) / len(v) for k, v in pool.means.items()}
        ours = pools.get(("diffgap", (source, target), ""))
        for key in ("r1>", "r1<", "cosine"):
            draws = pool.draws(key, counts)
            record[f"{key}_ci"] = interval(draws)
            if ours is not None:
                record[f"diffgap_minus_this_{key}_ci"] = interval(ours.draws(key, counts) - draws)
        records.append(record)
    return records


COLUMNS: tuple[tuple[str, str, float, str], ...] = (
    ("R@1 >", "r1>", 1, ".3f"), ("R@5 >", "r5>", 1, ".3f"), ("R@10 >", "r10>", 1, ".3f"),
    ("R@1 <", "r1<", 1, ".3f"), ("R@5 <", "r5<", 1, ".3f"), ("R@10 <", "r10<", 1, ".3f"),
    ("fused >", "fused r1>", 1, ".3f"), ("fused <", "fused r1<", 1, ".3f"),
    ("cosine", "cosine", 1, ".3f"), ("MMD^2", "mmd2", 1000, ".1f"), ("Frechet", "frechet", 1, ".3f"),
    ("params", "parameters", 1e-6, ".2f"), ("pairs seen", "pairs_seen", 1, ".0f"),
    ("seconds", "train_seconds", 1, ".0f"), ("us/row", "refine_us", 1, ".0f"),
)  # fmt: skip


def table(records: list[Record]) -> str:
    """One block a direction."""
    blocks = []
    for source, target in dict.fromkeys((r["source"], r["target"]) for r in records):
        lines = [["", *(c[0] for c in COLUMNS)]]
        for r in records:
            if (r["source"], r["target"]) == (source, target):
                name = f"{r['method']}{', ' if r['variant'] else ''}{r['variant']}"
                cells = [
                    "-" if r.get(key) is None or r[key] != r[key] else f"{scale * r[key] + 0.0:{form}}"
                    for _, key, scale, form in COLUMNS
                ]
                lines.append([name, *cells])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = [
            "  ".join(c.ljust(w) if k == 0 else c.rjust(w) for k, (c, w) in enumerate(zip(line, widths, strict=True)))
            for line in lines
        ]
        blocks.append("\n".join([f"{source} to {target} (parameters in millions)", *text]))
    return "\n\n".join(blocks)


def folds_of(options: argparse.Namespace) -> Iterator[tuple[EmbeddingTable, EmbeddingTable, EmbeddingTable]]:
    """(train, validation, test) tables."""
    if options.data == "world":
        data = SyntheticDataModule(options.pairs, num_val=options.rows, num_test=options.rows)
        data.setup()
        yield data.rows("train"), data.rows("val"), data.rows("test")
        return
    whole = with_units(EmbeddingTable.read(options.data), "id")
    for number, (train, test) in enumerate(splits(whole)):
        if options.folds is None or number < options.folds:
            yield (*hold_out(train, 0.2, 0), test)


def full_defaults() -> None:
    """Parameters, and CPU time of a row in batches of 4, of the priors as their packages build them; untrained."""
    rows = unit(torch.randn(4, 512, generator=torch.Generator().manual_seed(0)), dim=1)
    makes = {
        "DiffusionPrior, 256 empty text tokens": lambda: DALLE2Prior(512, tokens=256),
        "DiffusionPrior, no text tokens": lambda: DALLE2Prior(512),
        "PriorTransformer": lambda: UnCLIPPrior(512),
    }
    for name, make in makes.items():
        prior = make()
        prior.measure(rows, rows)
        begun = time.process_time()
        prior.sample(rows)
        spent = (time.process_time() - begun) / len(rows)
        print(f"{name}: {sum(p.numel() for p in prior.parameters()):,} parameters, {1e6 * spent:,.0f} us a row")
        del prior
    pairs = [unit(torch.randn(500, 512), dim=1) for _ in range(2)]
    ids = {m: torch.arange(500) for m in FORWARD}
    refiner = DiffGAPRefiner.measure(dict(zip(FORWARD, pairs, strict=True)), ids)
    refiner.refine(rows, source="text", target="audio")
    begun = time.process_time()
    for _ in range(10):
        refiner.refine(rows, source="text", target="audio")
    spent = (time.process_time() - begun) / len(rows) / 10
    print(f"diffgap: {sum(p.numel() for p in refiner.parameters()):,} parameters, {1e6 * spent:,.0f} us a row")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", default="world", help="`world`, or an embedding table with folds")
    parser.add_argument("--pairs", type=int, default=20_000, help="training pairs of the world")
    parser.add_argument("--rows", type=int, default=1000, help="validation and test pairs of the world")
    parser.add_argument("--folds", type=int, help="only the first so many folds of a table")
    parser.add_argument("--seconds", type=float, default=240, help="CPU seconds that a prior may train")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="default: all")
    parser.add_argument("--full-defaults", action="store_true", help="only time the priors as shipped; needs 5 GB")
    parser.add_argument("--json", type=Path, metavar="PATH")
    options = parser.parse_args()
    torch.set_num_threads(1)  # CPU time is then the time of one core
    if options.full_defaults:
        full_defaults()
        return
    config, batch_size = ("quickstart", 128) if options.data == "world" else ("table", 64)
    known = methods(config, options.seconds, batch_size)
    unknown = sorted(set(options.methods or ()) - set(known))
    if unknown:
        raise SystemExit(f"--methods: unknown {', '.join(unknown)}; expected some of {', '.join(known)}")
    pools = run(folds_of(options), {n: f for n, f in known.items() if n in (options.methods or known)}, options.seeds)
    num_ids = 1 + max(int(torch.cat(u).max()) for pool in pools.values() for u in pool.units.values())
    records = records_of(pools, num_ids, 1000)
    print(table(records))
    if options.json:
        print(f"wrote {write_json(options.json, [{k: None if v != v else v for k, v in r.items()} for r in records])}")


if __name__ == "__main__":
    main()
