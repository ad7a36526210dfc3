"""Kernels, bytes and collectives of a compiled program, read from its optimized HLO.

XLA for GPU has no `cost_analysis`. A kernel here is an instruction of the entry
computation, or of one that it calls, unless it only names or waits. Its bytes are its
operands and its results; an operand that a fusion only slices counts as the slices.

Limits: a loop's body counts once, the branches of a conditional count nothing, and an
array that is updated in place counts whole.
"""

import math
import re
from typing import NamedTuple

COLLECTIVES = "all-reduce all-gather all-to-all collective-permute reduce-scatter"
COMPUTATION = re.compile(r"^(ENTRY )?%([\w.\-]+) \(.*?^}", re.MULTILINE | re.DOTALL)
INSTRUCTION = re.compile(
    r"^ +(?:ROOT )?%([\w.\-]+) = (.+?) ([a-z][\w\-]*)\(([^)]*)\)(.*)$", re.MULTILINE
)
# Of f32[8,3] the bits and the dimensions; pred has no bits in its name, and is a byte.
ARRAY = re.compile(r"\b(?:pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")
NAME = re.compile(r"%([\w.\-]+)")
MOVES_NOTHING = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast"}
MOVES_NOTHING |= {"opt-barrier", "after-all", "partition-id", "replica-id"}
MOVES_NOTHING |= {"conditional"}
CALLS = {"call", "while", "async-start"}
SUMS = {"convolution", "dot", "reduce", "reduce-window"}
VIEWS = {"bitcast", "reshape"}
SLICES = {"slice", "dynamic-slice"}


class Traffic(NamedTuple):
    kernels: int
    nbytes: int


class Instruction(NamedTuple):
    """`%name = type opcode(arguments), attributes`."""

    name: str
    type: str
    opcode: str
    arguments: str
    attributes: str

    @property
    def nbytes(self):
        """Of the results."""
        bits = (
            int(width or 8) * math.prod(map(int, filter(None, dimensions.split(","))))
            for width, dimensions in ARRAY.findall(self.type)
        )
        return sum(bits) // 8

    @property
    def operands(self):
        return NAME.findall(self.arguments)


def traffic(program, only=None):
    """The kernels of `program` and the bytes that they move; `only` some opcodes."""
    moved = [
        i.nbytes + sum(reads)
        for i, body, reads in _kernels(program)
        if only is None or only & {inner.opcode for inner in body}
    ]
    return Traffic(len(moved), sum(moved))


def _kernels(program):
    """(instruction, what is in it, the bytes it reads of each operand) of each."""
    computations, entry = {}, None
    for match in COMPUTATION.finditer(program.as_text()):
        found = map(Instruction._make, INSTRUCTION.findall(match[0]))
        computations[match[2]] = list(found)
        entry = match[2] if match[1] else entry

    def kernels(name):
        sizes = {i.name: i.nbytes for i in computations[name]}
        for i in computations[name]:
            called = [n for n in NAME.findall(i.attributes) if n in computations]
            if i.opcode in CALLS:
                for other in called:
                    yield from kernels(other)
            elif i.opcode not in MOVES_NOTHING and not i.opcode.endswith("-done"):
                body = computations[called[0]] if i.opcode == "fusion" else [i]
                reads = [
                    _read(body, position, sizes[operand])
                    for position, operand in enumerate(i.operands)
                ]
                yield i, body, reads

    return kernels(entry)


def _read(body, position, whole):
    """The bytes that a kernel reads of an operand: `whole`, or slices of it."""
    views, nbytes = set(), 0
    for i in body:
        if i.opcode == "parameter" and i.arguments == str(position):
            views.add(i.name)
        elif views.intersection(i.operands):
            if i.opcode in VIEWS:
                views.add(i.name)
            elif i.opcode in SLICES:
                nbytes += i.nbytes
            else:
                return whole
    return min(nbytes, whole) if views else whole


def collectives(program):
    """How many of each kind a program has, those that it has, out of branches."""
    opcodes = [i.opcode.removesuffix("-start") for i, *_ in _kernels(program)]
    return {
        kind: opcodes.count(kind) for kind in COLLECTIVES.split() if kind in opcodes
    }
