"""What type checkers and editors see: users' programs in pyright's strict mode."""

import ast
import dataclasses
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from flax import nnx

import jaxbn
import jaxbn.convert
import jaxbn.linen
import jaxbn.nnx

CLEAN = """
# pyright: strict
from typing import Any, assert_type

import jax
import numpy as np
from flax import nnx

import jaxbn
import jaxbn.nnx
from jaxbn.linen import BatchNorm, BatchRenorm, find_pairs, folded
from jaxbn.linen import inspect_statistics, recalibrate, weight_decay_mask

x = jax.lax.full((8, 4), 1.0)
rows = np.arange(24.0, dtype=np.float32).reshape(6, 4)
params, state = jaxbn.init(4, use_bias=False)
assert_type(params, jaxbn.Params)
assert_type(params.scale, jax.Array | None)
y, state = jaxbn.batch_norm(
    x, params, state, train=True, momentum=None, axis=(-1,), mask=x[:, :1] < 9,
    running_variance="unbiased")
assert_type(y, jax.Array)
assert_type(state, jaxbn.State)
y, state = jaxbn.ghost_batch_norm(x, params, state, train=True, ghost_batch_size=4)
r_max = jaxbn.ramp_r_max(state.num_updates)
y, state = jaxbn.batch_renorm(
    rows, params, state, train=True, r_max=r_max, d_max=5, derivative="jvp")
moments = jaxbn.merge_moments(jaxbn.batch_moments(x), jaxbn.batch_moments(rows))
assert_type(moments, jaxbn.Moments)
n, mean, var = moments
state = jaxbn.update_state(state, moments, momentum=0.9)
assert_type(jaxbn.normalize(x, mean, var, *params), jax.Array)
y, cache = jaxbn.forward(x, params.scale, params.bias, epsilon=1e-3)
dx, dscale, dbias = jaxbn.backward(y, cache)
assert_type(dx, jax.Array)
assert dscale is not None and dbias is None
assert_type(dscale, jax.Array)

model = BatchNorm(False, -1, None, derivative="jvp", name="norm")
assert_type(model(x), jax.Array)
assert_type(BatchRenorm(r_max=2.0, d_max=1.0)(x, True, mask=x > -9), jax.Array)
variables = recalibrate(model, {}, [x], sequential=True, train=True)
assert_type(variables, dict[str, Any])
assert_type(weight_decay_mask(model, x, train=True), dict[str, Any])
for layer in inspect_statistics(variables, model, [x], train=True):
    assert_type(layer.name, str)
    assert_type(layer.worst_mean_over_std, float)
pairs = find_pairs(model, x, train=False)
assert_type(pairs.unfoldable, dict[str, str])
assert_type(jaxbn.fold_tree(variables, pairs), dict[str, Any])
with folded(pairs):
    assert_type(model.use_running_average, bool | None)

class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.norm = jaxbn.nnx.BatchNorm(4, momentum=0.9, derivative="jvp", rngs=rngs)
        self.renorm = jaxbn.nnx.BatchRenorm((4,), r_max=2.0, use_scale=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        assert_type(self.norm(x, mask=x > -9), jax.Array)
        return self.renorm(x, use_running_average=True)

net = Net(nnx.Rngs(0))
assert_type(jaxbn.nnx.weight_decay_mask(net), nnx.State[Any, Any])
assert_type(jaxbn.nnx.fold(net, jaxbn.nnx.find_pairs(net, x)), Net)
assert net.norm.scale is not None
assert_type(net.norm.scale[...], jax.Array)
assert_type(net.norm.mean[...], jax.Array)
"""

WRONG = """
# pyright: strict
import jax
import jaxbn
from flax import nnx as flax_nnx
from jaxbn import nnx
from jaxbn.linen import BatchNorm, BatchRenorm, recalibrate

x = jax.lax.full((8, 4), 1.0)
params, state = jaxbn.init("four")  # wrong
params, state = jaxbn.init(4)
jaxbn.batch_norm(x, params, state)  # wrong
jaxbn.batch_norm(x, params, state, train="yes")  # wrong
jaxbn.batch_norm(x, params, state, train=True, eps=1e-3)  # wrong
jaxbn.batch_norm(x, state, params, train=True)  # wrong
jaxbn.batch_norm(x, params, state, train=True, running_variance="sample")  # wrong
params.gamma  # wrong
state.mean = x  # wrong
jaxbn.backward(x, state)  # wrong
BatchNorm(momentun=0.9)  # wrong
BatchNorm(debias="yes")  # wrong
BatchRenorm(False)(x, False, x > 0)  # wrong
recalibrate(BatchNorm(False), {}, x.sum)  # wrong
rngs = flax_nnx.Rngs(0)
nnx.BatchNorm(4)  # wrong
nnx.BatchNorm(4, 0.9, rngs=rngs)  # wrong
nnx.BatchNorm(4, rngs=rngs).scale[...]  # wrong
nnx.BatchRenorm(4, momentun=0.9, rngs=rngs)  # wrong
nnx.BatchRenorm(4, ghost_batch_size=2, rngs=rngs)  # wrong
"""


def pyright(*arguments, cwd):
    pytest.importorskip("pyright")
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    command = [sys.executable, "-m", "pyright", "--outputjson"]
    result = subprocess.run(
        [*command, "--pythonpath", sys.executable, *arguments],
        cwd=cwd,
        env=os.environ | {"PATH": path},  # --verifytypes looks nowhere else
        capture_output=True,
        text=True,
        check=False,
    )
    return json.loads(result.stdout)


def test_programs_are_clean_and_mistakes_are_found_where_they_are(tmp_path):
    (tmp_path / "user_clean.py").write_text(CLEAN.lstrip())
    (tmp_path / "user_wrong.py").write_text(WRONG.lstrip())
    report = pyright(".", cwd=tmp_path)
    assert report["summary"]["filesAnalyzed"] == 2
    lines = WRONG.lstrip().splitlines()
    wrong = {i for i, line in enumerate(lines) if line.endswith("# wrong")}
    found = set()
    for d in report["generalDiagnostics"]:
        if d["severity"] in ("error", "warning"):
            assert Path(d["file"]).stem == "user_wrong", d
            found.add(d["range"]["start"]["line"])
    assert found == wrong


def test_all_public_types_are_known(tmp_path):
    """What `pyright --verifytypes jaxbn --ignoreexternal` prints, and docstrings."""
    report = pyright("--verifytypes", "jaxbn", "--ignoreexternal", cwd=tmp_path)
    completeness = report["typeCompleteness"]
    assert not [s for s in completeness["symbols"] if not s["isTypeKnown"]]
    assert completeness["completenessScore"] == 1
    assert completeness["exportedSymbolCounts"]["withKnownType"] > 50
    assert completeness["missingFunctionDocStringCount"] == 0
    assert completeness["missingClassDocStringCount"] == 0


def public(module):
    """What `__all__` names, or else is defined here or handed on as `X as X`."""
    tree = ast.parse(inspect.getsource(module))
    defined = (ast.FunctionDef, ast.ClassDef)
    names = {node.name for node in tree.body if isinstance(node, defined)}
    imports = (node for node in tree.body if isinstance(node, ast.ImportFrom))
    names |= {a.asname for node in imports for a in node.names if a.name == a.asname}
    names = getattr(module, "__all__", names)
    things = {name: getattr(module, name) for name in sorted(names) if name[0] != "_"}
    return {
        f"{module.__name__}.{name}": thing
        for name, thing in things.items()
        if not inspect.ismodule(thing)
    }


MODULES = [jaxbn, jaxbn.convert, jaxbn.linen, jaxbn.nnx]
PUBLIC = {name: value for module in MODULES for name, value in public(module).items()}


@pytest.mark.parametrize("name", PUBLIC)
def test_docstring_names_every_argument(name):
    """What an editor shows: a signature, and beside it a word on each part of it."""
    thing = PUBLIC[name]
    doc = inspect.getdoc(thing)
    assert doc
    assert len(doc.splitlines()[0]) > 10
    if inspect.isclass(thing) and issubclass(thing, nnx.Module):
        thing = thing.__init__  # all that Flax lets an editor see
        doc = f"self: {inspect.getdoc(thing)}"
    parts = list(inspect.signature(thing).parameters)
    if dataclasses.is_dataclass(thing):  # an heir tells of its own fields
        parts = [part for part in vars(thing)["__annotations__"] if part in parts]
    # One entry may name several arguments: "axis, mask: As for `batch_norm`."
    named = re.findall(r"^ *((?:[*\w]+,\s+)*[*\w]+):", doc, re.MULTILINE)
    named = {word.strip("*") for words in named for word in re.split(r",\s+", words)}
    missing = [p for p in parts if p not in named and p not in ("parent", "name")]
    assert missing == []
