"Compress Mixture-of-Experts language models around one shared core per layer and projection."
import sys
from pathlib import PurePath

__version__ = "0.1.0"
__all__ = ["CompressionConfig", "CompressionStatistics", "compress_checkpoint", "compress_model", "evaluate_model", "export_to_hf_format", "load_compressed_model",
           "load_tiny", "perplexity", "read_texts", "save_compressed_model", "self_sequences", "tiny_path", "tiny_text", "token_sequences"]


def _complete() -> None:
    "Import all of the package: it takes torch and transformers, and registers the compressed form with these."
    import moe_nb.kernels as _  # puts the faster forms of the experts behind the switch of transformers
    from moe_nb.checkpoint import load_compressed_model, save_compressed_model
    from moe_nb.compress import compress_model
    from moe_nb.evaluate import evaluate_model, perplexity
    from moe_nb.export import export_to_hf_format
    from moe_nb.layer import CompressionConfig
    from moe_nb.statistics import CompressionStatistics
    from moe_nb.stream import compress_checkpoint
    from moe_nb.text import read_texts, self_sequences, token_sequences
    from moe_nb.tiny import load_tiny, tiny_path, tiny_text

    found = locals()
    globals().update({name: found[name] for name in __all__})


def __getattr__(name: str):
    "What the package exports, also where nothing was imported yet."
    if name not in __all__:
        raise AttributeError(f"module 'moe_nb' has no attribute {name!r}")
    _complete()
    return globals()[name]


def _is_command() -> bool:
    "Whether this process is `moe-nb`, which looks at its arguments before it waits for torch and transformers."
    as_module = sys.argv[:1] == ["-m"] and "-m moe_nb.cli" in " ".join(sys.orig_argv)
    return as_module or PurePath(*sys.argv[:1]).name == "moe-nb"


if not _is_command():  # every other process has all of the package, registered with transformers
    _complete()
