"""scvi-tools' JaxSCVI (Flax Linen), with `jaxbn.linen.BatchNorm` for `nn.BatchNorm`.

    pip install -e . 'scvi-tools[jax]' && python tests/clients/cells.py

(It needs PyTorch; `pip install torch` first, if you want its CPU build.) A variational
autoencoder of gene counts is trained on the data that scvi-tools makes up for its own
tests, by Flax's class and by ours, from the same numbers. Then each model is saved, and
loaded with the other class: the cells must be where they were.
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
import numpy as np
import scvi
from flax import linen as nn
from scvi.model import JaxSCVI

import jaxbn.linen
from jaxbn.cli.common import integer_from

NORMS = {"flax": nn.BatchNorm, "jaxbn": jaxbn.linen.BatchNorm}
# float32: what its roundings in two layers of inference come to.
EQUAL = 1e-6
# Of the loss, relative: a tenth of what the last epochs change.
TRAINED_ALIKE = 1e-4


def put_in_place(norm: Any) -> Any:
    """Whenever the model is traced, `nn.BatchNorm` is `norm`."""
    return mock.patch.object(nn, "BatchNorm", norm)


def train(norm: Any, cells: Any, seed: int, epochs: int) -> JaxSCVI:
    scvi.settings.seed = seed
    with put_in_place(norm):
        model = JaxSCVI(cells, n_latent=5)
        model.train(
            max_epochs=epochs,
            train_size=0.9,
            check_val_every_n_epoch=1,
            enable_progress_bar=False,
        )
    return model


def load(norm: Any, path: Path, cells: Any) -> JaxSCVI:
    # It trains for one step, to know the variables, and shows a bar of its own.
    with put_in_place(norm), contextlib.redirect_stdout(io.StringIO()):
        return JaxSCVI.load(path, cells)


def latent(norm: Any, model: JaxSCVI) -> np.ndarray:
    with put_in_place(norm):
        return model.get_latent_representation()


def rows(args: argparse.Namespace) -> Iterator[_report.Row]:
    cells = scvi.data.synthetic_iid()
    JaxSCVI.setup_anndata(cells, batch_key="batch")
    models = {}
    for name, norm in NORMS.items():
        models[name] = train(norm, cells, args.seed, args.epochs)
    for name in ("elbo_train", "elbo_validation"):
        last = {
            norm: float(model.history[name].iloc[-1, 0])
            for norm, model in models.items()
        }
        difference = abs(last["jaxbn"] / last["flax"] - 1)
        yield {"what": name, **last, "holds": difference < TRAINED_ALIKE}
    for writer, reader in (("flax", "jaxbn"), ("jaxbn", "flax")):
        before = latent(NORMS[writer], models[writer])
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "model")
            models[writer].save(path)
            after = latent(NORMS[reader], load(NORMS[reader], path, cells))
        error = float(np.abs(after - before).max() / np.abs(before).max())
        label = f"saved by {writer}: latents move by"
        yield {"what": label, reader: error, "holds": error < EQUAL}


def main() -> int:
    parser = _report.parser(__doc__)
    count = integer_from(1)
    parser.add_argument("--epochs", type=count, metavar="N", default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # Lightning's and scvi's, of no concern here
    for name in ("lightning.pytorch", "lightning.fabric", "scvi"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return _report.report(
        rows(args),
        args,
        total=4,
        title=f"JaxSCVI on synthetic cells, {args.epochs} epochs",
        packages=["scvi-tools"],
    )


if __name__ == "__main__":
    sys.exit(main())
