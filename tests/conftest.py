"No network, one thread, and no slow tests unless they are asked for."

import os

os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    OMP_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
)
os.environ.pop("IN_TEST", None)  # under it nbdev_export does nothing


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes; run with -m slow")
    config.option.markexpr = config.option.markexpr or "not slow"
