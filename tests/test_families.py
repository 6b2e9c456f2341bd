"""Six families of transformers, of four layouts of experts, through everything.

The table of all families is nbs/experiments/families.ipynb."""

import pytest

from families import CAPABILITIES, TICK, prove

SIX = ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "aria", "nemotron_h"]


@pytest.mark.parametrize("family", SIX)
def test_family(family):
    row = prove(family)
    assert row["layers"] and all(row[name] == TICK for name in CAPABILITIES), row["reason"]
    assert row["difference"] < 1e-4
