"""The pages of the documentation and the README: code that runs, prose that is plain.

Pages are notebooks/*.md; tests/test_site.py builds the site from them.
"""

import doctest
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from jaxbn.__main__ import main

ROOT = Path(__file__).parents[1]
README, GUIDE = ROOT / "README.md", ROOT / ".github" / "CONTRIBUTING.md"
PAGES = sorted((ROOT / "notebooks").rglob("*.md"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MOST_WORDS = 35

# Runs each block in names of its own, in the order of the page.
RUN = """
import json, sys
for block in json.load(sys.stdin):
    exec(compile(block, "<page>", "exec"), {"__name__": "__main__"})
"""


def blocks(path, language):
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(), re.DOTALL)


def name(path):
    return path.relative_to(ROOT).as_posix()


exhaustive = [
    pytest.param(p, marks=pytest.mark.exhaustive) for p in PAGES if blocks(p, "python")
]


@pytest.mark.parametrize("path", [README, *exhaustive], ids=name)
def test_blocks_run(path, tmp_path):
    """In a process of their own, as a reader would, in JAX's default configuration."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    subprocess.run(
        [sys.executable, "-c", RUN],
        input=json.dumps(blocks(path, "python")),
        text=True,
        check=True,
        cwd=tmp_path,
        env=env | {"JAX_PLATFORMS": "cpu"},
    )


@pytest.mark.parametrize("path", [p for p in PAGES if blocks(p, "pycon")], ids=name)
def test_messages_are_these(path):
    text = "\n".join(blocks(path, "pycon"))
    test = doctest.DocTestParser().get_doctest(text, {}, name(path), str(path), 0)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    before = jax.config.jax_traceback_filtering
    jax.config.update("jax_traceback_filtering", "off")  # no note beside the message
    try:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            result = runner.run(test)
    finally:
        jax.config.update("jax_traceback_filtering", before)
    assert result.attempted
    assert not result.failed


@pytest.mark.parametrize("path", [README, GUIDE, *PAGES], ids=name)
def test_commands_exist(path, capsys):
    """Each `jaxbn ...` in code has its subcommand, and that each of its flags."""
    text = path.read_text()
    code = [*blocks(path, "sh"), *re.findall(r"`([^`\n]+)`", text)]
    begins = re.compile(r"(?:^|/|do |&& )jaxbn ([a-z][^;&\n]*)", re.MULTILINE)
    calls = begins.findall("\n".join(code))
    for command, *words in map(str.split, calls):
        assert command in {"train", "bench", "check", "inspect", "reproduce"}, command
        with pytest.raises(SystemExit):
            main([command, "--help"])
        known = re.findall(r"--[\w-]+", capsys.readouterr().out)
        assert {word for word in words if word.startswith("--")} <= {*known}, command


def prose(text):
    """Paragraphs, list entries and cells of tables, as a reader's words."""
    text = re.sub(r"```.*?```|<!--.*?-->|\$\$.*?\$\$", "\n\n", text, flags=re.DOTALL)
    text = re.sub(r"!?\[([^]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"`[^`]*`", "code", text)
    text = re.sub(r"^\s*([*+-]|\d+\.|#+) ", "\n\n", text, flags=re.MULTILINE)
    text = re.sub(r"^\|.*", lambda row: row[0].replace("|", "\n\n"), text, flags=re.M)
    return re.split(r"\n\s*\n", text)


def sentences(text):
    for paragraph in prose(text):
        yield from re.split(r"(?<=[.!?])[\s*)\"]+(?=\S)", " ".join(paragraph.split()))


def written(path):
    """The Markdown of a file, also of a notebook."""
    if path.suffix != ".ipynb":
        return path.read_text()
    cells = json.loads(path.read_text())["cells"]
    cells = [cell for cell in cells if cell["cell_type"] == "markdown"]
    return "\n\n".join("".join(cell["source"]) for cell in cells)


@pytest.mark.parametrize("path", [README, GUIDE, *PAGES, *NOTEBOOKS], ids=name)
def test_sentences_are_short(path):
    counted = [(len(re.findall(r"\w\S*", s)), s) for s in sentences(written(path))]
    assert [(n, s) for n, s in counted if n > MOST_WORDS] == []


def test_the_count_of_words():
    long = "word " * 40
    assert [len(s.split()) for s in sentences(f"One, two.\n\n* {long}.")][-1] == 41
    code = f"`{long}` and\n| a | {long[:90]} |"
    assert max(len(s.split()) for s in sentences(code)) < 35


def test_spelling(tmp_path):
    """Codespell's list of misspellings, over prose and docstrings."""
    pytest.importorskip("codespell_lib")
    texts = tmp_path / "notebooks.txt"
    texts.write_text("\n".join(map(written, NOTEBOOKS)))
    paths = [README, GUIDE, *PAGES, ROOT / "jaxbn", texts]
    command = [sys.executable, "-m", "codespell_lib", *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("", 0), done.stderr
