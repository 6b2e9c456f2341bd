"Render the notebooks as pages with mkdocs, into _site (`make site`): no network, no link that leads nowhere."

import re
import shutil
import sys
import tempfile
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
from mkdocs.commands.build import build
from mkdocs.config import load_config
from nbdev.process import NBProcessor
from nbdev.processors import hide_, hide_line, strip_ansi
from readme import ROOT, show_code

NOTEBOOKS = ROOT / "nbs"
NOTEBOOK_LINK = re.compile(r"(\]\((?![a-z]+:)[^)\s]+)\.ipynb\b")
ANCHOR = re.compile(r"(\]\((?![a-z]+:)[^)\s]*#)([^)\s]+)")
STEPS = [hide_, hide_line, strip_ansi]


def to_pages(text):
    "Links to notebooks as links to pages, whose anchors are in lower case"
    text = NOTEBOOK_LINK.sub(r"\1.html", text)
    return ANCHOR.sub(lambda match: match[1] + match[2].lower(), text)


def stage(path, folder):
    "Write the notebook below `folder` without its hidden cells, links leading to pages"
    notebook = NBProcessor(path, STEPS, process=True).nb
    cells = []
    for cell in nbformat.from_dict(notebook).cells:
        if cell.cell_type == "markdown":
            cell.source = to_pages(cell.source)
        else:
            show_code(cell)
        for output in cell.get("outputs", []):
            text = output.get("data", {}).get("text/markdown")
            if text:
                output["data"]["text/markdown"] = to_pages("".join(text))
        cells.append(cell)
    notebook = nbformat.from_dict(dict(notebook, cells=cells))
    target = folder / path.relative_to(NOTEBOOKS)
    target.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, target)


class Page(HTMLParser):
    "Where the links of a page lead, and the anchors it has"

    def __init__(self, path):
        super().__init__()
        self.links, self.anchors = [], set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.anchors.add(attributes.get("id"))
        if tag == "a" and attributes.get("href"):
            self.links.append(attributes["href"])


def broken_links(site):
    "Links between pages of the site that lead nowhere, as (page, link)"
    pages = {path.resolve(): Page(path) for path in site.rglob("*.html")}
    broken = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or path.name == "404.html":
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            anchors = pages[target].anchors if target in pages else {parts.fragment}
            if not target.exists() or (parts.fragment and unquote(parts.fragment) not in anchors):
                broken.append((str(path.relative_to(site.resolve())), link))
    return broken


def main():
    "Build the site; exit 1 where a link is broken"
    site = ROOT / "_site"
    with tempfile.TemporaryDirectory() as folder:
        for path in sorted(NOTEBOOKS.rglob("*.ipynb")):
            if ".ipynb_checkpoints" not in path.parts:
                stage(path, Path(folder))
        for path in NOTEBOOKS.rglob("*.yaml"):
            shutil.copy(path, Path(folder) / path.relative_to(NOTEBOOKS))
        settings = dict(docs_dir=folder, site_dir=str(site))
        build(load_config(str(ROOT / ".ci" / "mkdocs.yml"), **settings))
    broken = broken_links(site)
    for page, link in broken:
        print(f"{page}: {link} leads nowhere", file=sys.stderr)
    print(f"{len(list(site.rglob('*.html')))} pages in {site}, {len(broken)} broken links")
    return bool(broken)


if __name__ == "__main__":
    sys.exit(main())
