"""Flax's own tests, from its source distribution, with our classes in Flax's place."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import flax
import pytest

import jaxbn

# A pytest plugin: imported before Flax's test modules are, and so before they say
# `nn.BatchNorm`. It counts constructions, to show that they got our class.
PLUGIN = """
import functools
import sys

import flax.{api}
import pytest
from jaxbn.{api} import BatchNorm

constructed = 0
init = BatchNorm.__init__


@functools.wraps(init)
def counting(self, *args, **kwargs):
    global constructed
    constructed += 1
    init(self, *args, **kwargs)


BatchNorm.__init__ = counting
home = sys.modules[flax.{api}.BatchNorm.__module__]
flax.{api}.BatchNorm = home.BatchNorm = BatchNorm


@pytest.fixture(autouse=True, scope="session")
def report(record_testsuite_property):
    yield
    record_testsuite_property("constructed", constructed)
"""


class Suite(NamedTuple):
    api: str
    files: tuple[str, ...]
    keyword: str
    num_tests: int  # at least; counted with Flax 0.12.8 and 0.12.12


LINEN = Suite(
    api="linen",
    files=("linen_test.py", "summary_test.py", "linen_transforms_test.py"),
    keyword="batch_norm or batchnorm or BatchNorm or summary",
    num_tests=22,
)


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
@pytest.mark.parametrize("suite", [LINEN], ids=lambda suite: suite.api)
def test_flax_tests_pass(suite: Suite, flax_tests: Path, tmp_path: Path) -> None:
    (tmp_path / "drop_in_plugin.py").write_text(PLUGIN.format(api=suite.api))
    report = tmp_path / "report.xml"
    path = [str(tmp_path), str(Path(jaxbn.__file__).parents[1])]
    path += filter(None, [os.environ.get("PYTHONPATH")])
    options = ["-p", "drop_in_plugin", "-k", suite.keyword, f"--junit-xml={report}"]
    files = [flax_tests / suite.api / file for file in suite.files]
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *files],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path), "PYTEST_ADDOPTS": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout

    results = ElementTree.parse(report)
    passed = [case for case in results.iter("testcase") if len(case) == 0]
    assert len(passed) >= suite.num_tests, ran.stdout
    (constructed,) = results.iter("property")
    assert constructed.get("name") == "constructed"
    assert int(constructed.get("value", 0)) > 0
