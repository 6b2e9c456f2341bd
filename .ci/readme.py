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


def render(root=ROOT):
    "Return the text of README.md and its images, a dict from path to bytes"
    nb = NBProcessor(
        Path(root) / NOTEBOOK, [hide_, hide_line, rm_export, strip_ansi], process=True
    ).nb
    nb = nbformat.reads(nb2str(nb), as_version=4)
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            cell.source = LINK.sub(from_root, cell.source)
        elif cell.cell_type == "code":
            lines = cell.source.splitlines()
            if "#| echo: false" in lines:
                cell.metadata["transient"] = {"remove_source": True}
            cell.source = "\n".join(
                line for line in lines if not line.lstrip().startswith("#|")
            ).strip()
            for output in cell.outputs:
                if "text/markdown" in output.get("data", {}):
                    output["data"]["text/markdown"] = LINK.sub(
                        from_root, "".join(output["data"]["text/markdown"])
                    )
    nb.metadata["language_info"] = {"name": "python"}
    text, resources = MarkdownExporter().from_notebook_node(
        nb, resources={"unique_key": "index", "output_files_dir": IMAGES}
    )
    text = re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+$", "", text, flags=re.M))
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
