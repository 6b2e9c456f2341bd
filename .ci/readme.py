"Render README.md from nbs/index.ipynb: the outputs stored in the notebook, without its hidden cells."

import posixpath
import re
from pathlib import Path

import nbformat
from execnb.nbio import nb2str
from nbconvert import MarkdownExporter
from nbdev.process import NBProcessor
from nbdev.processors import hide_, hide_line, rm_export, strip_ansi

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = "nbs/index.ipynb"
IMAGES = "nbs/images"
LINK = re.compile(r"""(\]\(|src="|href=")(?![a-z]+:|[#/])([^)"\s]+)""")


def from_root(match):
    "Rewrite a link relative to nbs/ so that it holds in README.md, one folder up"
    return match[1] + posixpath.normpath(posixpath.join("nbs", match[2]))


def rewrite_links(cell):
    "Make the links of a cell, and of the markdown that it shows, relative to the root"
    if cell.cell_type == "markdown":
        cell.source = LINK.sub(from_root, cell.source)
    for output in cell.get("outputs", []):
        data = output.get("data", {})
        if "text/markdown" in data:
            data["text/markdown"] = LINK.sub(from_root, "".join(data["text/markdown"]))


def show_code(cell):
    "Take the directives out of a cell of code, and all of it where it says `#| echo: false`"
    lines = cell.source.splitlines()
    if "#| echo: false" in lines:
        cell.metadata["transient"] = {"remove_source": True}
    code = [line for line in lines if not line.lstrip().startswith("#|")]
    cell.source = "\n".join(code).strip()


def render(root=ROOT):
    "Return the text of README.md and its images, a dict from path to bytes"
    steps = [hide_, hide_line, rm_export, strip_ansi]
    processed = NBProcessor(Path(root) / NOTEBOOK, steps, process=True).nb
    nb = nbformat.reads(nb2str(processed), as_version=4)
    for cell in nb.cells:
        rewrite_links(cell)
        if cell.cell_type == "code":
            show_code(cell)
    nb.metadata["language_info"] = {"name": "python"}
    text, resources = MarkdownExporter().from_notebook_node(
        nb, resources={"unique_key": "index", "output_files_dir": IMAGES}
    )
    text = re.sub(r"[ \t]+$", "", text, flags=re.M)
    text = re.sub(r"\n{3,}", "\n\n", text)
    return text.strip() + "\n", dict(resources["outputs"])


def main():
    "Write README.md and its images, and drop images that are no longer shown"
    text, images = render()
    for old in (ROOT / IMAGES).glob("index_*"):
        old.unlink()
    for name, data in images.items():
        (ROOT / name).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / name).write_bytes(data)
    (ROOT / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
