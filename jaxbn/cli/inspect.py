"""`jaxbn inspect`: every batch norm of a checkpoint, the worst one first."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxbn._models import inspection
from jaxbn._models.inspection import STD_IS_LOST, LayerStatistics
from jaxbn.cli import common
from jaxbn.cli.common import CommandError, printable

DESCRIPTION = """\
Show each batch norm of a checkpoint: channels that are dead (variance near 0), whose
scale is near 0, and whose mean is so many standard deviations away from 0 that float16
or bfloat16 would lose them.

Of a run of `train`, also how far the running statistics are from those of the training
digits: the divergence KL(data || running) of two normals, in nats, mean over the
channels. The layer where it is largest comes first. Each layer is measured with its
input normalized by true statistics, so that a spoiled layer does not make those after
it look bad. 0.5 is a mean that is one standard deviation off. The test accuracy is
shown with and without the damage.

CHECKPOINT is the folder of a run, or a file with any model's Flax variables and
`batch_stats` in them (flax.serialization.to_bytes); these are shown without divergence.

examples:
  jaxbn inspect runs/cnn
  jaxbn inspect model.msgpack --json figures.json
"""

# A layer whose mean divergence is smaller is healthy.
LARGE_KL = 0.5

# The norms of `train` that have statistics.
NORMALIZED = ("jaxbn", "flax")

# What is written of each layer.
FIGURES = ("path", "num_features", "dead", "scale_near_zero", "not_finite")
FIGURES += ("worst_mean_over_std", "mean_kl", "worst_channel", "mean_over_std", "kl")


def add_arguments(parser: common.Parser) -> None:
    """Add the flags."""
    text = "the folder of a run, or a msgpack file"
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help=text)
    text = "which network of a run (default: jaxbn, if it is there)"
    parser.add_argument("--norm", choices=NORMALIZED, help=text)
    for name, what in (("json", "all figures"), ("png", "the picture")):
        text = f"where to write {what} (default: <name>.inspect.{name}, beside it)"
        parser.add_argument(f"--{name}", type=Path, metavar="FILE", help=text)


def run(args: argparse.Namespace) -> int:
    """Inspect, print and write."""
    path = args.checkpoint
    given = {"--json": args.json, "--png": args.png}
    for flag, file in given.items():
        if file is not None:
            if [path, *given.values()].count(file) > 1:
                raise CommandError(f"argument {flag}: {file} would be overwritten")
            common.make_room(flag, file)
    common.first_line(f"loading {printable(str(path))}")
    test_accuracy = None
    if path.is_dir():
        norm, layers, test_accuracy = of_run(path, args.norm)
        name, beside = f"{path.name} ({norm})", path / norm
    else:
        layers, name, beside = of_variables(path), path.name, path.with_suffix("")

    console = common.console()
    if test_accuracy is None:
        console.print("not a run of `train`: without a model and data, no divergence")
    console.print(*table(layers, console.width), sep="\n")
    console.print(*verdict(layers, test_accuracy), sep="\n")
    json = args.json or beside.with_name(f"{beside.name}.inspect.json")
    png = args.png or beside.with_name(f"{beside.name}.inspect.png")
    content = {"checkpoint": str(path), "test_accuracy": test_accuracy}
    content["mean_over_std_limits"] = STD_IS_LOST
    figures = [{name: getattr(layer, name) for name in FIGURES} for layer in layers]
    try:
        common.write_json(json, content | {"layers": figures})
        draw(png, printable(name), layers)
    except CommandError as error:
        console.print(f"{error}: the report above is all there is")
    else:
        console.print(f"written: {json} and {png}")
    return 0


def of_variables(path: Path) -> list[LayerStatistics]:
    """Return the layers of any model's variables."""
    from flax import serialization

    from jaxbn.linen import inspect_statistics

    data = path.read_bytes()
    # Bytes that are not a checkpoint can fail in any way, in msgpack and NumPy too.
    try:
        content: Any = serialization.msgpack_restore(data)
        if not isinstance(content, Mapping):
            raise ValueError(f"it holds one {type(content).__name__}, not variables")
    except Exception as error:  # not its `repr`, which may hold the whole file
        what = f"{type(error).__name__}: {error!s:.200}"
        raise CommandError(f"{path} is not a Flax checkpoint: {what}") from error
    if {"norm", "settings", "state"} <= content.keys():
        raise CommandError(f"{path} is of an earlier jaxbn's train: train anew")
    try:
        return inspect_statistics(content)
    except Exception as error:
        raise CommandError(f"{path} has no batch norm to inspect: {error}") from error


def of_run(
    folder: Path, norm: str | None
) -> tuple[str, list[LayerStatistics], dict[str, float]]:
    """Return a norm of a run, its layers, and what they do to the test accuracy."""
    import jax
    from flax.traverse_util import flatten_dict, unflatten_dict

    from jaxbn.cli.session import Checkpoints
    from jaxbn.cli.training import Mesh, Trainer, load_digits
    from jaxbn.linen import inspect_statistics

    if any(folder.glob("*.msgpack")):
        raise CommandError(f"{folder} is of an earlier jaxbn's train: train anew")
    kept = Checkpoints(folder)
    if kept.step is None:
        raise CommandError(f"{folder} holds no run of `train`")
    settings, seen = kept.load()
    found = [x for x in NORMALIZED if x in settings.norm and norm in (x, None)]
    if not found:
        wanted, have = norm or "batch norm", ", ".join(settings.norm)
        raise CommandError(f"{folder} has no {wanted}: its norm is {have}")
    data, mesh = load_digits(settings.data), Mesh(jax.local_devices()[:1])
    trainers = {each: Trainer(settings, each, data, mesh) for each in settings.norm}
    kept.restore(trainers, seen)
    state = trainers[found[0]].state
    # Our layers have the variables of Flax's, and record what they are given.
    trainer = Trainer(settings, "jaxbn", data, mesh)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    # In one batch: the statistics of each layer are then exactly those of the digits.
    images = [data.train_images]
    layers = inspect_statistics(variables, trainer.model, images, train=True)

    def accuracy(corrected: Sequence[LayerStatistics]) -> float:
        flat: dict[Any, Any] = dict(flatten_dict(state.batch_stats))
        for layer in corrected:
            for name in ("mean", "var") if layer.data else ():
                value = getattr(layer.data, name)
                flat[*layer.path, name] = jax.numpy.asarray(value, "float32")
        stats = unflatten_dict(flat)
        return trainer.test_accuracy(state._replace(batch_stats=stats))

    test_accuracy = {
        "running statistics": accuracy([]),
        "true ones in the worst layer": accuracy(layers[:1]),
        "true ones in all layers": accuracy(layers),
    }
    return found[0], layers, test_accuracy


def table(layers: Sequence[LayerStatistics], width: int) -> list[Any]:
    """Return a row for each layer, and names below where they are too long for it."""
    from rich.text import Text

    names = [printable(layer.name) for layer in layers]
    fits = max(map(len, names)) + 33 <= width
    headings = ("chan-\nnels", "dead", "scale\nnear 0", "worst\nmean/std", "KL\n(nats)")
    narrow: dict[str, Any] = {"padding": 0, "show_edge": False}
    rows = common.table("batch norm" if fits else "", *headings, **narrow)
    for i, layer in enumerate(layers):
        ratio, kl = layer.worst_mean_over_std, layer.mean_kl
        flagged = (  # red where it is true
            (str(len(layer.dead)), layer.dead),
            (str(len(layer.scale_near_zero)), layer.scale_near_zero),
            (f"{ratio:.2g}", ratio > min(STD_IS_LOST.values())),
            (common.cell(kl, ".2g"), (kl or 0) > LARGE_KL),
        )
        cells = [Text(text, "bold red" if flag else "") for text, flag in flagged]
        rows.add_row(names[i] if fits else str(i + 1), str(layer.num_features), *cells)
    key = [] if fits else [f"{i}  {name}" for i, name in enumerate(names, 1)]
    lost = ", ".join(f"{limit:.0f} in {name}" for name, limit in STD_IS_LOST.items())
    return [rows, *key, f"where |mean|/std is above {lost}, the std is lost"]


def verdict(
    layers: Sequence[LayerStatistics], test_accuracy: Mapping[str, float] | None
) -> list[str]:
    """Return what is wrong, or that nothing is, and what it does to the accuracy."""
    lines = []
    for layer in layers:
        said = []
        if test_accuracy is not None and layer.data is None:
            said.append("what it is given is not finite")
        if layer.mean_kl is not None and layer.mean_kl > LARGE_KL:
            where = ", ".join(map(str, layer.worst_channel or ()))
            far = f"running statistics {layer.mean_kl:.3g} nats from the data's"
            said.append(f"{far}, most in channel {where}")
        for what, channels in (
            ("running statistics not finite", layer.not_finite),
            ("dead", layer.dead),
            ("scale near 0", layer.scale_near_zero),
        ):
            if channels:
                said.append(f"{what} in {len(channels)} channels")
        lost = [k for k, v in STD_IS_LOST.items() if layer.worst_mean_over_std > v]
        if lost and not layer.not_finite:
            said.append(f"not for {' or '.join(lost)} as it is")
        if said:
            lines.append(f"{printable(layer.name)}: {'; '.join(said)}")
    if not lines:
        lines.append(f"all healthy: {len(layers)} batch norms")
    if test_accuracy is not None:
        shares = (f"{share:.2%} with {how}" for how, share in test_accuracy.items())
        lines.append(f"test accuracy: {', '.join(shares)}")
    return lines


def draw(png: Path, title: str, layers: Sequence[LayerStatistics]) -> None:
    """Draw a dot for each channel, and a row for each layer."""
    from matplotlib.figure import Figure

    scales = [None if x.scale is None else abs(x.scale) for x in layers]
    dead = inspection.DEAD * inspection.EPSILON
    # By quantity: its values, what is least shown of it, and the limits.
    panels: dict[str, tuple[list[np.ndarray | None], float, dict[str, float]]] = {
        "KL(data || running), nats": ([x.kl for x in layers], 1e-6, {}),
        "|mean| / std": ([x.mean_over_std for x in layers], 1e-3, STD_IS_LOST),
        "running variance": ([x.var for x in layers], 1e-9, {"dead": dead}),
        "|scale|": (scales, 1e-5, {"near 0": inspection.SCALE_NEAR_ZERO}),
    }
    panels = {k: v for k, v in panels.items() if any(x is not None for x in v[0])}
    size = (2 + 3 * len(panels), 1.8 + 0.3 * len(layers))
    figure = Figure(figsize=size, layout="constrained")
    columns = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (label, panel) in zip(columns, panels.items(), strict=True):
        rows, floor, limits = panel
        for row, each in enumerate(rows):
            # Only finite numbers have a place on an axis; None has no number.
            values = np.asarray(each, float)
            values = np.maximum(values[np.isfinite(values)], floor)
            if values.size:  # else the axis has no limits
                style: Any = {"ms": 4, "mew": 0, "color": "#0072B2", "alpha": 0.45}
                axes.plot(values, np.full(values.shape, row), "o", **style)
                axes.plot(values.mean(), row, "|k", ms=13, mew=2)
        for (name, limit), line in zip(limits.items(), ("--", ":"), strict=False):
            axes.axvline(limit, color="#D55E00", linestyle=line, label=name)
        axes.set(xlabel=label, xscale="log")
        if limits:
            place = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0)}
            axes.legend(**place, ncols=len(limits), fontsize=8, frameon=False)
        axes.grid(axis="y", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    names = [printable(layer.name)[-60:] for layer in layers]  # leave room for dots
    columns[0].set_yticks(range(len(layers)), names, parse_math=False)
    columns[0].set_ylim(len(layers) - 0.5, -0.5)  # the first row on top
    title = f"batch norms of {title}: a dot is a channel, a bar their mean"
    figure.suptitle(title, parse_math=False)  # a `$` is a `$`
    common.write_png(png, figure)
