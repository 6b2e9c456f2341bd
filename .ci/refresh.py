"Run notebooks in place and store their outputs: `python .ci/refresh.py [notebook or folder ...]`."

import base64
import importlib.util
import io
import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbdev.clean import nbdev_clean
from nbdev.config import get_config
from nbdev.process import extract_directives
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
QUIET = dict(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TQDM_DISABLE="1",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",
    PYTHONHASHSEED="0",
    PYTHONWARNINGS="ignore:IProgress not found",
    PYTHONPATH=str(ROOT),
)


def skipped(cell, flags):
    "True for a cell that keeps its stored output: the ones that nbdev_test skips too"
    directives = extract_directives(cell, remove=False)
    flagged = bool(flags & directives.keys())
    never = directives.get("eval:", [""])[0].lower() == "false"
    return flagged or never or "nbdev_export(" in cell.source


class Client(NotebookClient):
    "Runs the cells without a skip flag, in the notebook's own folder"

    flags = frozenset()

    async def async_execute_cell(self, cell, cell_index, **kwargs):
        if cell.cell_type == "code" and skipped(cell, self.flags):
            return cell
        return await super().async_execute_cell(cell, cell_index, **kwargs)


def shrunk(png):
    "A PNG with 64 colours, in base64 as it comes: a quarter of the size, and the eye sees no difference"
    image = Image.open(io.BytesIO(base64.b64decode(png)))
    if image.mode == "P":
        return png
    small = io.BytesIO()
    image.convert("RGB").quantize(64).save(small, "PNG", optimize=True)
    return base64.b64encode(small.getvalue()).decode()


def shrink_figures(nb):
    "Make the figures of a notebook small"
    for cell in nb.cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                data["image/png"] = shrunk(data["image/png"])


def refresh(path, flags):
    "Run the notebook at `path` and write it back; a cell that raises leaves the file as it was"
    start = time.time()
    nb = nbformat.read(path, as_version=4)
    client = Client(
        nb,
        timeout=3600,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        extra_arguments=["--log-level=40"],
        resources={"metadata": {"path": str(path.parent)}},
    )
    client.flags = flags
    client.execute()
    shrink_figures(nb)
    nbformat.write(nb, path)
    nbdev_clean(fname=str(path))
    print(f"{path.relative_to(ROOT)}  {time.time() - start:.0f} s", flush=True)


def notebooks(names):
    "The notebooks named, or found under the folders named"
    for name in map(Path, names):
        if name.suffix == ".ipynb":
            yield name.resolve()
            continue
        for path in sorted(name.rglob("*.ipynb")):
            hidden = any(part[0] in "._" for part in path.relative_to(name).parts)
            if not hidden:
                yield path.resolve()


def main():
    "Refresh the notebooks on the command line, or all of them"
    programs = str(Path(sys.executable).parent)
    os.environ.update(QUIET, PATH=os.pathsep.join([programs, os.environ["PATH"]]))
    os.environ.pop("IN_TEST", None)
    paths = list(notebooks(sys.argv[1:] or [ROOT / "nbs"]))
    os.chdir(ROOT)  # nbdev looks for settings.ini from the current folder
    flags = set(get_config().tst_flags.split())
    if importlib.util.find_spec("triton"):
        flags.discard("triton")
    for path in paths:
        refresh(path, flags)


if __name__ == "__main__":
    main()
