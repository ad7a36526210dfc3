"""What is measured: layer shapes as they occur, modes and dtypes."""

from collections.abc import Sequence
from typing import NamedTuple

# The least that forward + backward can move, in copies, each of which reads x once and
# writes it once. Forward: read x for its moments; read it again and write y. Backward:
# read x and dy for the sums; read both again and write dx. In all, 8 sizes of x.
FLOOR_IN_COPIES = 4

CHAIN_LAYERS = 8

# Mode: what one call computes.
MODES = {
    "forward": "training: y and the new running statistics",
    "forward+backward": "that, and the gradients of x, scale and bias",
    "inference": "y from the running statistics",
    "conv": "forward+backward of batch norm and relu between two 1 x 1 convolutions",
    "chain": f"forward+backward of {CHAIN_LAYERS} layers in one program",
}
QUICK_MODES = ("forward+backward", "chain")
DTYPES = ("float32", "bfloat16")


class Case(NamedTuple):
    """A batch norm layer.

    Attributes:
      suite: Where it is from.
      shape: Of its input.
      axis: The feature axis.
      quick: Whether it stands for its suite under `--quick`.
      nets: Whether it is also measured between convolutions and in a chain.
    """

    suite: str
    shape: tuple[int, ...]
    axis: int = -1
    quick: bool = False
    nets: bool = False

    @property
    def name(self) -> str:
        """Such as `32x64x56x56, axis 1`."""
        sizes = "x".join(map(str, self.shape))
        return sizes if self.axis == -1 else f"{sizes}, axis {self.axis}"

    @property
    def modes(self) -> tuple[str, ...]:
        """The modes that make sense for it."""
        return tuple(mode for mode in MODES if self.nets or mode not in NET_MODES)


class Group(NamedTuple):
    """What is timed in the same rounds: one layer in one mode, by every contender."""

    case: Case
    dtype: str
    mode: str

    def __str__(self) -> str:
        """For people."""
        return f"{self.case.name} {self.dtype} {self.mode}"

    @property
    def num_layers(self) -> int:
        """The number of batch norm layers in one call."""
        return CHAIN_LAYERS if self.mode == "chain" else 1

    @property
    def has_backward(self) -> bool:
        """Whether there are gradients."""
        return self.mode not in ("forward", "inference")


NET_MODES = ("conv", "chain")

_RESNET50 = [  # He et al. 2015, every shape that is followed by a batch norm
    *((112, 64), (56, 64), (56, 256), (28, 128), (28, 512)),
    *((14, 256), (14, 1024), (7, 512), (7, 2048)),
]

SUITES = {
    "resnet50": [
        Case(
            "resnet50",
            (32, size, size, features),
            quick=(size, features) == (28, 128),
            nets=(size, features) == (28, 128),
        )
        for size, features in _RESNET50
    ],
    "critic": [
        Case("critic", (256, 256)),
        Case("critic", (256, 2048), quick=True),
    ],
    "tabular": [Case("tabular", (65536, 64), quick=True)],
    "volume": [Case("volume", (4, 32, 32, 32, 32), quick=True)],
    "channel-first": [
        Case("channel-first", (32, 64, 56, 56), axis=1, quick=True),
        Case("channel-first", (32, 128, 28, 28), axis=1, nets=True),
        Case("channel-first", (32, 1024, 14, 14), axis=1),
        Case("channel-first", (4, 32, 32, 32, 32), axis=1),
    ],
    # Takes seconds: to see that everything works.
    "tiny": [
        Case("tiny", (64, 16, 16, 4), quick=True, nets=True),
        Case("tiny", (64, 4, 16, 16), axis=1),
        Case("tiny", (1024, 16)),
    ],
}
DEFAULT_SUITES = tuple(name for name in SUITES if name != "tiny")


def groups(
    suites: Sequence[str], dtypes: Sequence[str], modes: Sequence[str], *, quick: bool
) -> list[Group]:
    """All groups that were asked for, in the order in which they are measured."""
    return [
        Group(case, dtype, mode)
        for suite in suites
        for case in SUITES[suite]
        for dtype in dtypes
        for mode in modes
        if mode in case.modes and (case.quick or not quick)
    ]
