"Compress Mixture-of-Experts language models around one shared core per layer and projection."
import importlib
import sys
from pathlib import PurePath

__version__ = "0.1.0"
__all__ = ["CompressionConfig", "CompressionStatistics", "compress_checkpoint", "compress_model", "evaluate_model", "export_to_hf_format", "load_compressed_model",
           "load_tiny", "perplexity", "read_texts", "save_compressed_model", "self_sequences", "tiny_path", "tiny_text", "token_sequences"]

_ROOMS = dict(
    fast_experts=(),  # puts the faster forms of the experts behind the switch of transformers
    checkpoint=("load_compressed_model", "save_compressed_model"),
    compress=("compress_model",),
    evaluate=("evaluate_model", "perplexity"),
    export=("export_to_hf_format",),
    layer=("CompressionConfig",),
    statistics=("CompressionStatistics",),
    stream=("compress_checkpoint",),
    text=("read_texts", "self_sequences", "token_sequences"),
    tiny=("load_tiny", "tiny_path", "tiny_text"),
)


def _complete() -> None:
    "Import all of the package: it takes torch and transformers, and registers the compressed form with these."
    for room, names in _ROOMS.items():
        module = importlib.import_module(f"moe_nb.{room}")
        for name in names:
            globals()[name] = getattr(module, name)


def __getattr__(name: str):
    "What the package exports, also where nothing was imported yet."
    if name not in __all__:
        raise AttributeError(f"module 'moe_nb' has no attribute {name!r}")
    _complete()
    return globals()[name]


def _is_command() -> bool:
    "Whether this process is `moe-nb`, which looks at its arguments before it waits for torch and transformers."
    as_module = sys.argv[:1] == ["-m"] and "-m moe_nb.cli" in " ".join(sys.orig_argv)
    as_script = sys.argv[:1] == ["-c"] and "from moe_nb.cli import main" in " ".join(sys.orig_argv)
    return as_module or as_script or PurePath(*sys.argv[:1]).name == "moe-nb"


if not _is_command():  # every other process has all of the package, registered with transformers
    _complete()
