"Six families of transformers, of four layouts of experts, through everything: the table of all of them is nbs/experiments/families.ipynb."

import pytest
from families import CAPABILITIES, TICK, prove


@pytest.mark.parametrize(
    "family", ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "aria", "nemotron_h"]
)
def test_family(family):
    row = prove(family)
    assert row["layers"] and all(row[name] == TICK for name in CAPABILITIES), row["reason"]
    assert row["difference"] < 1e-4
