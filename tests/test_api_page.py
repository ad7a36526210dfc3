"""The API page, all of it, as tests/api_template/module.html.jinja2 renders it."""

import importlib
import inspect
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

pytestmark = pytest.mark.peers
pytest.importorskip("pdoc")

ROOT = Path(__file__).parents[1]
TEMPLATE = (ROOT / "tests" / "api_template" / "module.html.jinja2").read_text()
COMMAND = re.search(r"^ *(pdoc .*)$", TEMPLATE, re.MULTILINE)[1].split()
FORMULAS = ["backward", "batch_norm", "batch_renorm", "forward", "merge_moments"]
MODULES = ["jaxbn", "jaxbn.convert", "jaxbn.linen", "jaxbn.nnx"]


class Page(HTMLParser):
    """What a page links to, what can be linked to, and the docstring at each place."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.docs = set(), [], {}
        # The innermost id, and the depth of <div> in its docstring.
        self.place, self.depth = "", 0
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if "id" in attrs:
            self.ids.add(attrs["id"])
        if tag == "a" and "href" in attrs:
            self.links.append(attrs["href"])
        if tag in ("section", "div") and not self.depth:
            self.place = attrs.get("id", self.place)
        if tag == "div" and (self.depth or attrs.get("class") == "docstring"):
            self.depth += 1

    def handle_endtag(self, tag):
        self.depth -= tag == "div" and self.depth > 0

    def handle_data(self, data):
        if self.depth:
            self.docs[self.place] = self.docs.get(self.place, "") + data


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    """The folder, and what pdoc said."""
    folder = tmp_path_factory.mktemp("api")
    at = COMMAND.index("-o") + 1
    done = subprocess.run(
        [sys.executable, "-m", *COMMAND[:at], folder, *COMMAND[at + 1 :]],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    )
    return folder, done.stdout + done.stderr


@pytest.fixture(scope="module")
def pages(rendered):
    """By path, all but the index, which leads to the first."""
    folder, _ = rendered
    paths = (p for p in folder.rglob("*.html") if p != folder / "index.html")
    return {path: Page(path.read_text()) for path in paths}


def page_of(name, rendered, pages):
    return pages[rendered[0] / f"{name.replace('.', '/')}.html"]


def test_pdoc_has_nothing_to_complain_of(rendered):
    """But of our classes' attributes: the module that they name is not their file."""
    said = [line for line in rendered[1].splitlines() if "is taken from" not in line]
    assert said == []


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_is_there(module, rendered, pages):
    """Functions, classes, and the methods and properties that are written there."""
    found = page_of(module, rendered, pages)
    for name in (public := importlib.import_module(module)).__all__:
        if inspect.ismodule(obj := getattr(public, name)):
            assert obj.__name__ in MODULES
            continue
        names = [name]
        if inspect.isclass(obj):
            names += [f"{name}.{member}" for member in vars(obj) if shown(obj, member)]
        for each in names:
            assert found.docs[each].strip(), each
    assert len(pages) == len(MODULES)


def shown(cls, name):
    """Properties and methods, rather than a field or its default, or Flax's."""
    value, written = vars(cls)[name], f"{cls.__qualname__}.{name}"
    if name == "__call__":
        return True
    is_method = inspect.isfunction(value) and value.__qualname__ == written
    return not name.startswith("_") and (is_method or isinstance(value, property))


@pytest.mark.parametrize("module", ["jaxbn.linen", "jaxbn.nnx"])
def test_flax_modules_show_how_they_are_called(module, rendered, pages):
    found = page_of(module, rendered, pages)
    assert {"BatchNorm.__init__", "BatchNorm.__call__"} <= found.ids
    assert not {"BatchNorm.parent", "BatchNorm.bias_init"} & found.ids
    other = ({"jaxbn.linen", "jaxbn.nnx"} - {module}).pop().split(".")[1]
    assert f"{other}.html" in {link.split("/")[-1] for link in found.links}


def test_links_lead_somewhere(rendered, pages):
    folder, _ = rendered
    internal = 0
    for path, page in pages.items():
        for link in page.links:
            if link.startswith("https://pdoc.dev"):
                continue
            file, _, anchor = link.partition("#")
            target = (path.parent / file).resolve() if file else path
            assert target.is_relative_to(folder.resolve()), link
            assert target in {p.resolve() for p in pages}, link
            there = next(p for f, p in pages.items() if f.resolve() == target.resolve())
            assert not anchor or anchor in there.ids, f"{path.name}: {link}"
            internal += 1
    assert internal > 100


def test_sections_and_formulas_are_rendered(rendered, pages):
    """No heading is left as text, and MathJax gets formulas as they are written."""
    for page in pages.values():
        for name, text in page.docs.items():
            assert not re.search(r"^\s*Args:", text, re.MULTILINE), name
            assert text.count("$$") % 2 == 0, name
    functions = page_of("jaxbn", rendered, pages).docs
    for name in FORMULAS:
        written = inspect.getdoc(getattr(importlib.import_module("jaxbn"), name))
        formula = re.search(r"\$\$.*?\$\$", written, re.DOTALL)[0]
        assert "".join(formula.split()) in "".join(functions[name].split())
    assert "MathJax" in (rendered[0] / "jaxbn.html").read_text()


def test_types_have_their_public_names(rendered):
    html = (rendered[0] / "jaxbn.html").read_text()
    assert "jaxlib" not in html
