"""ONNX's own cases for batch norm: features on axis 1, the running variance biased."""

import importlib

import jax.numpy as jnp
import pytest
from cases import assert_close

import jaxbn

NAMES = ["example", "epsilon", "example_training_mode", "epsilon_training_mode"]


@pytest.mark.peers
@pytest.mark.parametrize("name", NAMES)
def test_onnx(name):
    pytest.importorskip("onnx")
    home = "onnx.backend.test.case.node"
    importlib.import_module(f"{home}.batch_normalization")  # which registers its cases
    cases = {
        case.name.removeprefix("test_batchnorm_"): case
        for case in importlib.import_module(home)._NodeTestCases
        if case.model.graph.node[0].op_type == "BatchNormalization"
    }
    assert set(cases) == set(NAMES)
    (node,) = cases[name].model.graph.node
    given = {attribute.name: attribute for attribute in node.attribute}
    assert "momentum" not in given  # the default is 0.9, as ours
    train = "training_mode" in given and given["training_mode"].i == 1
    epsilon = given["epsilon"].f if "epsilon" in given else 1e-5
    for (x, scale, bias, mean, var), outputs in cases[name].data_sets:
        params = jaxbn.Params(jnp.array(scale), jnp.array(bias))
        state = jaxbn.State(jnp.array(mean), jnp.array(var), jnp.int32(0))
        kwargs = {"axis": 1, "epsilon": epsilon, "train": train}
        y, new = jaxbn.batch_norm(x, params, state, **kwargs)
        got = [y, new.mean, new.var] if train else [y]
        for actual, desired in zip(got, outputs, strict=True):
            assert actual.shape == desired.shape
            assert_close(actual, desired, jnp.float32, x.size // x.shape[1])
