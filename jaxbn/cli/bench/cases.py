"""The layers, modes and dtypes that `jaxbn bench` measures."""

from collections.abc import Sequence
from typing import NamedTuple

# The least that forward + backward can move, in copies of x; a copy reads x once and
# writes it once. Forward: read x for its moments; read it again and write y. Backward:
# read x and dy for the sums; read both again and write dx. In all, 8 sizes of x.
FLOOR_IN_COPIES = 4

# One call of "chain" is forward+backward of so many layers in one program.
CHAIN_LAYERS = 8
INFERENCE = "inference"  # the one mode without gradients
MODES = ("forward+backward", INFERENCE, "chain")
DTYPES = ("float32", "bfloat16")


class Case(NamedTuple):
    """A batch norm layer: where it is from, the shape of x, and the feature axis."""

    suite: str
    shape: tuple[int, ...]
    axis: int = -1
    quick: bool = False  # whether it stands for its suite under `--quick`
    chain: bool = False  # whether the mode "chain" includes it

    @property
    def name(self) -> str:
        """Such as `32x64x56x56, axis 1`."""
        sizes = "x".join(map(str, self.shape))
        return sizes if self.axis == -1 else f"{sizes}, axis {self.axis}"


class Group(NamedTuple):
    """What is timed in the same rounds: one layer in one mode, by every contender."""

    case: Case
    dtype: str
    mode: str

    def __str__(self) -> str:
        """Such as `65536x64 float32 chain`."""
        return f"{self.case.name} {self.dtype} {self.mode}"

    @property
    def num_layers(self) -> int:
        """The number of batch norm layers in one call."""
        return CHAIN_LAYERS if self.mode == "chain" else 1


# He et al. 2015: every size and number of features that a batch norm follows.
RESNET50 = [(112, 64), (56, 64), (56, 256), (28, 128), (28, 512)]
RESNET50 += [(14, 256), (14, 1024), (7, 512), (7, 2048)]
CASES = [
    *(Case("resnet50", (32, s, s, n), -1, n == 128, n == 128) for s, n in RESNET50),
    Case("critic", (256, 256)),
    Case("critic", (256, 2048), quick=True),
    Case("tabular", (65536, 64), quick=True),
    Case("volume", (4, 32, 32, 32, 32), quick=True),
    Case("channel-first", (32, 64, 56, 56), axis=1, quick=True),
    Case("channel-first", (32, 128, 28, 28), axis=1, chain=True),
    Case("channel-first", (32, 1024, 14, 14), axis=1),
    Case("channel-first", (4, 32, 32, 32, 32), axis=1),
    # Takes seconds: to see that everything works.
    Case("tiny", (64, 16, 16, 4), quick=True, chain=True),
    Case("tiny", (64, 4, 16, 16), axis=1),
    Case("tiny", (1024, 16)),
]
SUITES = tuple(dict.fromkeys(case.suite for case in CASES))


def groups(
    suites: Sequence[str], dtypes: Sequence[str], modes: Sequence[str], *, quick: bool
) -> list[Group]:
    """Return the groups that were asked for, in the order of measuring."""
    return [
        Group(case, dtype, mode)
        for case in CASES
        if case.suite in suites and (case.quick or not quick)
        for dtype in dtypes
        for mode in modes
        if case.chain or mode != "chain"
    ]
