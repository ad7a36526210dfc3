"""The documentation site: it builds, its links lead somewhere, and nothing is foreign.

The command is the one at the top of notebooks/site/mkdocs.yml.
"""

import functools
import importlib
import inspect
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

pytestmark = pytest.mark.site
for package in ["mkdocs", "material", "mkdocstrings_handlers.python", "latex2mathml"]:
    pytest.importorskip(package)

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "notebooks" / "site" / "mkdocs.yml"
MODULES = ["jaxbn", "jaxbn.linen", "jaxbn.nnx", "jaxbn.convert"]
FETCHED = {"script": "src", "img": "src", "iframe": "src", "source": "src"}
FETCHED |= {"link": "href", "object": "data", "embed": "src"}


class Page(HTMLParser):
    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.fetched, self.formulas = set(), [], [], 0
        self.html = path.read_text()
        self.feed(self.html)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if "id" in attrs:
            self.ids.add(attrs["id"])
        if tag == "a" and attrs.get("href"):
            self.links.append(attrs["href"])
        if FETCHED.get(tag) in attrs:
            self.fetched.append(attrs[FETCHED[tag]])
        self.formulas += tag == "math"

    @functools.cached_property
    def words(self):
        """What a reader sees of the page itself, without code."""
        body = re.search(r"<article.*?</article>", self.html, re.DOTALL)[0]
        body = re.sub(r"<(pre|code|math)\b.*?</\1>", " ", body, flags=re.DOTALL)
        return re.sub(r"<[^>]*>", " ", body)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site").resolve()
    words = ["mkdocs", "build", "--strict", "--quiet", "-f", CONFIG, "-d", folder]
    env = {"JAX_PLATFORMS": "cpu", "NO_MKDOCS_2_WARNING": "1"}
    # No server can be reached.
    env |= dict.fromkeys(["http_proxy", "https_proxy"], "http://127.0.0.1:9")
    done = subprocess.run(
        [sys.executable, "-m", *words],
        env=os.environ | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "")
    return folder


@pytest.fixture(scope="module")
def pages(built):
    return {path: Page(path) for path in built.rglob("*.html")}


def test_every_page_and_notebook_is_there(built, pages):
    sources = [*CONFIG.parents[1].glob("*.md"), *CONFIG.parents[1].glob("*.ipynb")]
    names = {path.stem for path in pages if path.parent == built}
    assert names == {source.stem for source in sources} | {"404"}
    navigation = set(pages[built / "numerics.html"].links)
    assert {f"{name}.html" for name in names - {"404", "numerics"}} <= navigation


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_has_an_entry_with_an_example(module, built, pages):
    page = pages[built / "api" / f"{module.removeprefix('jaxbn.')}.html"]
    public = importlib.import_module(module)
    for each in public.__all__:
        if inspect.ismodule(getattr(public, each)):
            continue
        assert f"{module}.{each}" in page.ids
        start = page.html.index(f'id="{module}.{each}"')
        entry = page.html[start : page.html.find('<h3 id="', start)]
        assert re.search("Examples:.*&gt;&gt;&gt;", entry, re.DOTALL), each
    if module in ("jaxbn.linen", "jaxbn.nnx"):
        called = {f"{module}.BatchNorm.__call__", f"{module}.LayerStatistics.mean_kl"}
        assert called <= page.ids


def test_links_lead_somewhere(built, pages):
    internal = [
        (path, link)
        for path, page in pages.items()
        for link in page.links
        # Those of 404.html begin at the root of the server.
        if path.name != "404.html" and not re.match(r"https?://", link)
    ]
    assert len(internal) > 500
    for path, link in internal:
        file, _, anchor = unquote(link).partition("#")
        target = (path.parent / file).resolve() if file else path
        target = target / "index.html" if target.is_dir() else target
        assert target.is_relative_to(built), f"{path.name}: {link}"
        assert target.is_file(), f"{path.name}: {link}"
        if anchor and target in pages:
            assert anchor in pages[target].ids, f"{path.name}: {link}"


def test_nothing_comes_from_another_server(built, pages):
    for path, page in pages.items():
        for address in page.fetched:
            assert not re.match(r"(\w+:)?//", address), f"{path.name}: {address}"
            if path.name != "404.html":
                assert (path.parent / address.partition("?")[0]).exists(), address
        assert "@import" not in page.html
    for style in built.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*[\"']?(\w+:)?//", style.read_text())


def test_formulas_and_sections_are_rendered(built, pages):
    for path, page in pages.items():
        if path.name == "404.html":
            continue
        assert "$" not in page.words, path.name
        assert "\\frac" not in page.words, path.name
        assert not re.search("<p>(Args|Raises|Returns|Examples):", page.html)
    assert pages[built / "api" / "jaxbn.html"].formulas >= 5
    assert pages[built / "1-backward-by-hand.html"].formulas > 10
