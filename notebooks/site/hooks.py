"""What the site needs beside mkdocs: notebooks as pages, formulas as MathML, and links.

The notebooks become Markdown, with their stored outputs; nothing is run. Browsers
draw MathML by themselves, so that no page needs a script for its formulas.
"""

import base64
import json
import os
import re
import subprocess
import sys
from pathlib import Path

from latex2mathml.converter import convert
from markdown import Extension
from markdown.inlinepatterns import InlineProcessor
from mkdocs.structure.files import File

NOTEBOOKS = Path(__file__).parents[1]
# A cell's text may hold a fence of its own.
FENCE = "`" * 4


class Formula(InlineProcessor):
    """A formula between dollars, as MathML."""

    def __init__(self, pattern, md, display):
        super().__init__(pattern, md)
        self.display = display

    def handleMatch(self, m, data):
        # latex2mathml 3.81 sets a single letter in \mathrm in italics.
        tex = m[1].strip().replace(r"\mathrm", r"\text")
        math = convert(tex, display=self.display)
        html = f'<span class="formula-{self.display}">{math}</span>'
        return self.md.htmlStash.store(html), m.start(0), m.end(0)


class Formulas(Extension):
    """`$...$` in a line, `$$...$$` on lines of their own; code comes before them."""

    def extendMarkdown(self, md):
        block = Formula(r"(?s)\$\$(.+?)\$\$", md, "block")
        inline = Formula(r"\$(?!\s)([^$\n]+?)(?<!\s)\$(?!\d)", md, "inline")
        md.inlinePatterns.register(block, "formula-block", 187)
        md.inlinePatterns.register(inline, "formula-inline", 186)


def on_config(config):
    """Add the formulas to all Markdown, that of docstrings too."""
    config.markdown_extensions.append(Formulas())
    return config


def on_files(files, config):
    """Add a page for each notebook, and its pictures."""
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        text, pictures = page_of(json.loads(path.read_text()), path.stem)
        files.append(File.generated(config, f"{path.stem}.md", content=text))
        for name, png in pictures.items():
            files.append(File.generated(config, name, content=png))
    return files


def page_of(notebook, stem):
    """Return a notebook as Markdown, and its pictures by name."""
    parts, pictures, heading = [], {}, ""
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            headings = re.findall(r"^#+ (.*)", source, re.MULTILINE)
            heading = headings[-1] if headings else heading
            parts.append(source)
            continue
        parts.append(f"{FENCE}python\n{source}\n{FENCE}")
        for output in cell["outputs"]:
            if png := output.get("data", {}).get("image/png"):
                name = f"{stem}-{len(pictures) + 1}.png"
                pictures[name] = base64.b64decode(png)
                parts.append(f"![Plot: {heading}]({name})")
            else:
                text = output.get("data", {}).get("text/plain", output.get("text"))
                parts.append(f"{FENCE}text\n{''.join(text).rstrip()}\n{FENCE}")
    return "\n\n".join(parts), pictures


def on_page_markdown(markdown, page, config, files):
    """Lead to the pages of notebooks, and put in what a command's --help says."""
    markdown = re.sub(r"\]\(([\w/.-]+)\.ipynb(#[\w-]+)?\)", r"](\1.md\2)", markdown)
    return re.sub(r"<!-- (jaxbn [\w ]*--help) -->", said, markdown)


def said(match):
    command = [sys.executable, "-m", *match[1].split()]
    env = os.environ | {"COLUMNS": "80", "JAX_PLATFORMS": "cpu", "NO_COLOR": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
    return f"```text\n{done.stdout.rstrip()}\n```"


def on_page_content(html, page, config, files):
    """Link each public name in code to its entry, where it has one."""
    name = r'(?<!">)<code>(jaxbn(?:\.\w+)+)</code>(?!</a>)'
    entry = r'<autoref optional identifier="\1"><code>\1</code></autoref>'
    return re.sub(name, entry, html)
