"""Flax's own tests, from its source distribution, with our classes in Flax's place."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import flax
import pytest

import jaxbn

# A pytest plugin: imported before Flax's test modules are, and so before they say
# `nn.BatchNorm`. It counts constructions, to show that they got our classes.
PLUGIN = """
import functools
import sys

import flax.linen
import flax.nnx
import jaxbn.linen
import jaxbn.nnx
import pytest

constructed = {"linen": 0, "nnx": 0}

def put_in_place(flax_api, our_api, name):
    ours, home = our_api.BatchNorm, sys.modules[flax_api.BatchNorm.__module__]
    init = ours.__init__

    @functools.wraps(init)
    def counting(self, *args, **kwargs):
        constructed[name] += 1
        init(self, *args, **kwargs)

    ours.__init__ = counting
    flax_api.BatchNorm = home.BatchNorm = ours

put_in_place(flax.linen, jaxbn.linen, "linen")
put_in_place(flax.nnx, jaxbn.nnx, "nnx")

@pytest.fixture(autouse=True, scope="session")
def report(record_testsuite_property):
    yield
    for name, number in constructed.items():
        record_testsuite_property(name, number)
"""


# The files, a keyword, how many tests pass at least (counted with Flax 0.12.8 and
# 0.12.12), and one that cannot: it trains on batches of one element per feature, and
# asserts that the running mean moves; the running variance would decay towards 0.
NNX = "nn/normalization integration module transforms graph_utils summary helpers "
SUITES = {
    "linen": (
        "linen summary linen_transforms",
        "batch_norm or batchnorm or BatchNorm or summary",
        22,
        set(),
    ),
    "nnx": (f"{NNX} bridge/wrappers", "", 900, {"test_state_axes_simple_functional"}),
}


@pytest.fixture(scope="module")
def flax_tests(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flax")
    name = f"flax=={flax.__version__}"
    download = ["download", "--no-deps", "--no-binary", ":all:", "--dest", folder, name]
    subprocess.run([sys.executable, "-m", "pip", *download], check=True)
    (archive,) = folder.glob("flax-*.tar.gz")
    shutil.unpack_archive(archive, folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz") / "tests"


@pytest.mark.drop_in
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("api", SUITES)
def test_flax_tests_pass(api: str, flax_tests: Path, tmp_path: Path) -> None:
    names, keyword, at_least, cannot_pass = SUITES[api]
    (tmp_path / "drop_in_plugin.py").write_text(PLUGIN)
    report = tmp_path / "report.xml"
    path = [str(tmp_path), str(Path(jaxbn.__file__).parents[1])]
    path += filter(None, [os.environ.get("PYTHONPATH")])
    options = ["-p", "drop_in_plugin", "-k", keyword, f"--junit-xml={report}"]
    # Flax makes errors of warnings; some of its models see a batch of one on the way.
    options += ["-W", "ignore:training needs more than one element"]
    files = [flax_tests / api / f"{name}_test.py" for name in names.split()]
    env = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    env |= {"PYTHONPATH": os.pathsep.join(path), "PYTEST_ADDOPTS": ""}
    env |= {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "pytest", *options, *files]
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    ran = subprocess.run(command, cwd=tmp_path, env=env, **piped)
    results = ElementTree.parse(report)
    cases = {True: [], False: []}
    for case in results.iter("testcase"):
        if case.find("skipped") is None:
            cases[len(case) == 0].append(case.get("name", "").rstrip("0123456789"))
    assert set(cases[False]) <= cannot_pass, ran.stdout
    assert len(cases[True]) >= at_least, ran.stdout
    constructed = {p.get("name"): p.get("value", "") for p in results.iter("property")}
    assert int(constructed[api]) > 0
