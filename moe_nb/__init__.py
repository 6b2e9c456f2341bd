"Compress Mixture-of-Experts language models around one shared core per layer and projection."
import sys
from importlib import import_module
from importlib.machinery import PathFinder

__version__ = "0.2.0"
__all__ = ["CompressionConfig", "CompressionStatistics", "compress_checkpoint", "compress_model", "evaluate_model", "export_to_hf_format", "load_compressed_model",
           "load_tiny", "perplexity", "read_texts", "save_compressed_model", "self_sequences", "tiny_path", "tiny_text", "token_sequences"]

_MODULES = {
    "checkpoint": ("load_compressed_model", "save_compressed_model"),
    "compress": ("compress_model",),
    "evaluate": ("evaluate_model", "perplexity"),
    "export": ("export_to_hf_format",),
    "layer": ("CompressionConfig",),
    "statistics": ("CompressionStatistics",),
    "stream": ("compress_checkpoint",),
    "text": ("read_texts", "self_sequences", "token_sequences"),
    "tiny": ("load_tiny", "tiny_path", "tiny_text"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str):
    "What the package exports, imported when it is asked for: torch and transformers take seconds."
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'moe_nb' has no attribute {name!r}")
    found = getattr(import_module(f"moe_nb.{_MODULE_OF[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    "All names, also of what was not imported yet."
    return sorted({*globals(), *__all__})


class _SharedCoreLater:
    "Holds the place of our form among the quantizations of transformers until a checkpoint names it."

    @classmethod
    def from_dict(cls, *args, **kwargs):
        from moe_nb.hf_format import SharedCoreConfig

        return SharedCoreConfig.from_dict(*args, **kwargs)


def _hold_place() -> None:
    "Tell transformers that there is a quantization of our name."
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault("shared_core", _SharedCoreLater)


def _add_forms() -> None:
    "Put the faster forms of the experts behind the switch of transformers."
    import_module("moe_nb.kernels")  # which imports fast_experts


_AFTER = {"transformers.quantizers.auto": _hold_place, "moe_nb.hf_format": _add_forms}


class _AfterImport:
    "A finder that calls the function that `_AFTER` names for a module, once that module was imported."

    @staticmethod
    def find_spec(name: str, path=None, target=None):
        spec = PathFinder.find_spec(name, path, target) if name in _AFTER else None
        if spec is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_call(module):
            execute(module)
            _AFTER[name]()

        spec.loader.exec_module = execute_and_call
        return spec


sys.meta_path.insert(0, _AfterImport)
for _name, _then in _AFTER.items():
    if _name in sys.modules:  # it was there before us
        _then()
