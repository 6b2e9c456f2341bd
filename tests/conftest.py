"No network, one thread, and no slow tests unless they are asked for."

import gc
import importlib.util
import os
from pathlib import Path

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
    if importlib.util.find_spec("vllm") is None:  # these import it
        here = Path(__file__).resolve().parent
        rooms = [here / "vllm_run.py", *here.parent.glob("moe_nb/vllm_*.py")]
        config.option.ignore = [*(config.option.ignore or []), *map(str, rooms)]


def pytest_collection_finish(session):
    gc.freeze()  # torch and transformers are no garbage: the collector need not go through them again


def pytest_sessionfinish(session):
    gc.unfreeze()  # so that what is left at the end can go in order
