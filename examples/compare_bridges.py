"""Compare the closed-form bridges with the best possible score, from Python; `diffgap compare` does the same and more.

python examples/compare_bridges.py --methods raw centre ridge cca
"""

from __future__ import annotations

import argparse

from diffgap_lightning.bridges import default_bridges
from diffgap_lightning.data import SyntheticDataModule
from diffgap_lightning.evaluation.comparison import compare_methods
from diffgap_lightning.evaluation.report import format_table, write_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5000, help="training pairs")
    parser.add_argument("--test", type=int, default=500, help="test pairs")
    parser.add_argument("--methods", nargs="+", default=["raw", "centre", "ridge", "restored", "procrustes", "cca"])
    parser.add_argument("--json", help="write the records here")
    options = parser.parse_args()

    data = SyntheticDataModule(num_pairs=options.pairs, num_val=0, num_test=options.test)
    data.setup()
    train, test = data.rows("train"), data.rows("test")
    makers = default_bridges()
    bridges = {name: makers[name]().fit(train.embeddings, train.ids) for name in options.methods}
    records = compare_methods(bridges, test, bootstrap=200, optimum=data.optimum("test"))
    print(format_table(records))
    if options.json:
        write_json(options.json, records)


if __name__ == "__main__":
    main()
