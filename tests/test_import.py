"`import moe_nb` takes no time and brings nothing along; transformers knows the compressed form all the same."

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

import moe_nb
from moe_nb.fast_experts import FORMS

ORDERS = {
    "moe_nb first": "import moe_nb; from transformers import AutoModelForCausalLM",
    "transformers first": "from transformers import AutoModelForCausalLM; import moe_nb",
}
LOAD = """
import torch
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
with torch.no_grad():
    logits = model(torch.arange(32)[None]).logits
torch.save(logits, sys.argv[2])
from moe_nb.hf_names import ALL_EXPERTS_FUNCTIONS
from moe_nb.hf_format import SharedCoreQuantizer
assert isinstance(model.hf_quantizer, SharedCoreQuantizer)
print(json.dumps([ALL_EXPERTS_FUNCTIONS["shared_core"].__name__, *ALL_EXPERTS_FUNCTIONS.valid_keys()]))
"""


def run(code, *arguments):
    "What another process prints that runs this code"
    command = [sys.executable, "-c", "import json, sys\n" + code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def compressed(tmp_path_factory):
    "A compressed directory"
    folder = tmp_path_factory.mktemp("compressed")
    model, _ = moe_nb.compress_model(moe_nb.load_tiny()[0], moe_nb.CompressionConfig(ratio=0.25))
    moe_nb.save_compressed_model(model, folder / "model")
    return folder / "model"


def test_the_import_is_light():
    heavy = "[name for name in ('torch', 'transformers', 'numpy', 'pandas') if name in sys.modules]"
    found = run(f"import moe_nb; print(json.dumps([{heavy}, dir(moe_nb), moe_nb.__all__]))")
    assert found[0] == [] and set(found[2]) <= set(found[1])


def test_star_brings_every_name():
    names = {}
    exec("from moe_nb import *", names)
    assert set(moe_nb.__all__) == names.keys() - {"__builtins__"}
    with pytest.raises(AttributeError, match="no attribute 'compressed_model'"):
        moe_nb.compressed_model


@pytest.mark.parametrize(
    "order", ["moe_nb first", pytest.param("transformers first", marks=pytest.mark.slow)]
)
def test_transformers_loads_what_is_compressed(compressed, tmp_path, order):
    first, *known = run(ORDERS[order] + LOAD, compressed, tmp_path / "logits.pt")
    assert first == FORMS["shared_core"].__name__ and set(FORMS) <= set(known)
    model = AutoModelForCausalLM.from_pretrained(compressed)
    with torch.no_grad():
        expected = model(torch.arange(32)[None]).logits
    assert torch.equal(torch.load(tmp_path / "logits.pt"), expected)
