"""scvi-tools' JaxSCVI (Flax Linen), with `jaxbn.linen.BatchNorm` for `nn.BatchNorm`.

    python tests/clients/cells.py

A variational autoencoder of gene counts is trained on the data that scvi-tools makes up
for its own tests, from the same numbers: by Flax's class, by ours, and by Flax's in
`replace_batch_norm`, which must be equal to ours. Then each model is saved, and loaded
with the other class: the cells must be where they were.
"""

import argparse
import contextlib
import io
import logging
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import _report
import jax
import numpy as np
import scvi
from flax import linen as nn
from scvi.model import JaxSCVI

import jaxbn.linen
from jaxbn.cli.common import Parser, integer_from

# Contexts in which the model is traced.
WAYS = {
    "flax": contextlib.nullcontext,
    "jaxbn": lambda: mock.patch.object(nn, "BatchNorm", jaxbn.linen.BatchNorm),
    "replaced": jaxbn.linen.replace_batch_norm,
}
# float32: what its roundings in two layers of inference come to.
EQUAL = 1e-6
# Of the loss, relative: a tenth of what the last epochs change.
TRAINED_ALIKE = 1e-4


def train(way: str, cells: Any, seed: int, epochs: int) -> JaxSCVI:
    scvi.settings.seed = seed
    with WAYS[way]():
        model = JaxSCVI(cells, n_latent=5)
        model.train(
            max_epochs=epochs,
            train_size=0.9,
            check_val_every_n_epoch=1,
            enable_progress_bar=False,
        )
    return model


def load(way: str, path: Path, cells: Any) -> JaxSCVI:
    # It trains for one step, to know the variables, and shows a bar of its own.
    with WAYS[way](), contextlib.redirect_stdout(io.StringIO()):
        return JaxSCVI.load(path, cells)


def latent(way: str, model: JaxSCVI) -> np.ndarray:
    with WAYS[way]():
        return model.get_latent_representation()


def rows(args: argparse.Namespace) -> Iterator[_report.Row]:
    cells = scvi.data.synthetic_iid()
    JaxSCVI.setup_anndata(cells, batch_key="batch")
    models = {way: train(way, cells, args.seed, args.epochs) for way in WAYS}
    for name in ("elbo_train", "elbo_validation"):
        last = {
            way: float(model.history[name].iloc[-1, 0]) for way, model in models.items()
        }
        difference = abs(last["jaxbn"] / last["flax"] - 1)
        yield {"what": name, **last, "holds": difference < TRAINED_ALIKE}
    ours = models["jaxbn"].module.params
    same = {
        way: jax.tree.all(jax.tree.map(np.array_equal, model.module.params, ours))
        for way, model in models.items()
    }
    holds = same["replaced"] and not same["flax"]
    yield {"what": "equal to jaxbn's, to the bit", **same, "holds": holds}
    for writer, reader in (("flax", "jaxbn"), ("jaxbn", "flax")):
        before = latent(writer, models[writer])
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "model")
            models[writer].save(path)
            after = latent(reader, load(reader, path, cells))
        error = float(np.abs(after - before).max() / np.abs(before).max())
        label = f"saved by {writer}: latents move by"
        yield {"what": label, reader: error, "holds": error < EQUAL}


def main() -> int:
    parser = Parser(description=__doc__)
    count = integer_from(1)
    parser.add_argument("--epochs", type=count, metavar="N", default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # Lightning's and scvi's, of no concern here
    for name in ("lightning.pytorch", "lightning.fabric", "scvi"):
        logging.getLogger(name).setLevel(logging.ERROR)
    title = f"JaxSCVI on synthetic cells, {args.epochs} epochs"
    return _report.report(title, ["scvi-tools"], rows(args))


if __name__ == "__main__":
    sys.exit(main())
