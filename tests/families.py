"""A tiny random model of any family of transformers, and everything that moe_nb can do run on it.

Shared by test_families.py and nbs/experiments/families.ipynb."""

import copy
import re
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moe_nb.checkpoint import load_compressed_model, save_compressed_model
from moe_nb.compress import compress_model
from moe_nb.experts import find_experts, layout_of
from moe_nb.export import export_to_hf_format, lost_tensors
from moe_nb.hf_names import bare_model, ignored_patterns
from moe_nb.layer import CompressionConfig
from moe_nb.shards import open_source, predicting_layers
from moe_nb.shared_core import compressed_experts
from moe_nb.stream import compress_checkpoint

# The tiny model

VOCABULARY = 128

# Pattern of a field of a configuration -> its largest value; the first that matches the whole name counts
SIZES = {
    r"(\w+_)?vocab_size(_\w+)?": VOCABULARY,
    r"max_position_embeddings|max_sequence_length|n_positions": 256,
    r"num_hidden_layers|num_layers|n_layers?|depth|(en|de)coder_layers|num_hidden_blocks": 3,
    r"first_k_dense_replace|num_dense_layers|moe_layer_start_index": 1,
    r"(num|n)_(experts|routed_experts|local_experts)|moe_num_experts|num_moe_experts": 4,
    r"num_experts_per_tok(en)?|moe_top_?k|top_k_experts|moe_k|num_selected_experts": 2,
    r"n_group|topk_group|num_expert_group|n_groups|n_shared_experts": 1,
    r"qk_head_dim": 16,
    r"(\w+_)?(intermediate|ffn_hidden|ffn)_(size|dim)(_\w+)?|n_inner": 12,
    (
        r"(\w+_)?num_key_value_heads|n_kv_heads|num_kv_heads|linear_num_(key|value)_heads|"
        r"((num|n)_)?(\w+_)?(attention_)?heads|index_n_heads"
    ): 2,
    r"(\w+_)?(kv|q|o)_lora_rank|index_topk|sliding_window(_size)?": 8,
    r"(\w+_)?head_dim": 8,
    (
        r"(\w+_)?hidden_(size|dim)|d_model|n_embd|(\w+_)?embed_dim|emb_dim|dim|"
        r"moe_latent_size|projection_dim|adapter_\w*(dim|size)"
    ): 16,
}

# In place of None
NONE = {
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "top_k_experts": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 12,
    "head_dim": 8,
}


def tiny_value(name, value):
    "`value` of the field `name`, made small if it is a size; token ids stay within the vocabulary"
    if value is None:
        return NONE.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        return value
    if re.fullmatch(r"\w*token_(id|index)", name):
        return value if value < VOCABULARY else VOCABULARY - 1 - len(name)
    for pattern, largest in SIZES.items():
        if re.fullmatch(pattern, name):
            return min(value, largest)
    return value


def tiny_config(config_class, overrides=None):
    "The default configuration of `config_class` and of its parts, with small sizes; `overrides` have the last word"
    overrides = dict(overrides or {})
    changes = {}
    for name, value in vars(config_class()).items():
        if isinstance(value, PreTrainedConfig):
            changes[name] = tiny_config(type(value), overrides.pop(name, None))
        elif name.endswith("token_id") and isinstance(value, list):
            changes[name] = [min(token, VOCABULARY - 1) for token in value]
        elif not name.startswith("_") and tiny_value(name, value) != value:
            changes[name] = tiny_value(name, value)
    return config_class(**changes | overrides)


KINDS = ("CAUSAL_LM", "MULTIMODAL_LM", "IMAGE_TEXT_TO_TEXT")  # Of classes that generate text


def names_of_kind(kind):
    "`model_type` -> name of its class of one kind, or names"
    return getattr(modeling_auto, f"MODEL_FOR_{kind}_MAPPING_NAMES")


def head_of(model_type):
    "Name of the class that generates text for `model_type`; one that sees or hears too, if its configuration has parts"
    kinds = KINDS
    if CONFIG_MAPPING[model_type].sub_configs:
        kinds = (*KINDS[1:], KINDS[0])
    for kind in kinds:
        name = names_of_kind(kind).get(model_type)
        if name:
            return name if isinstance(name, str) else name[0]
    raise ValueError(f"{model_type} has no class that generates text")


def model_types():
    "Every `model_type` of transformers that has such a class and a configuration"
    names = set().union(*map(names_of_kind, KINDS))
    return sorted(name for name in names if name in CONFIG_MAPPING)


def tiny_model(model_type, overrides=None, device="cpu"):
    "A random fp32 model of `model_type`; on the meta device it takes no time"
    torch.manual_seed(0)
    config = tiny_config(CONFIG_MAPPING[model_type], overrides)
    config.architectures = [head_of(model_type)]
    with torch.device(device):
        model = bare_model(config, torch.float32)
    if device == "meta":
        return model
    for module in find_experts(model).values():
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return model


# What is done with it


@torch.no_grad()
def logits_of(model, ids):
    return model.eval()(ids, use_cache=False).logits.float()


def difference(found, expected):
    "Largest difference relative to the largest value"
    return ((found - expected).abs().max() / expected.abs().max()).item()


def same_tensors(one, two):
    "Raise unless two checkpoints hold the same tensors, bit for bit"
    one, two = open_source(Path(one)), open_source(Path(two))
    assert one.keys() == two.keys(), sorted(one.keys() ^ two.keys())[:3]
    for name in one:
        assert torch.equal(one[name][...], two[name][...]), name


def predicting_name(model):
    "Where a checkpoint of this family keeps a layer for multi-token prediction: before the rest of a name; or None"
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    patterns = [pattern for pattern in ignored_patterns(model) if "mtp" in pattern]
    for name in ("mtp.layers.0.", "model.mtp.layers.0.", "model.mtp_layers.0.", "mtp_dspark.0."):
        if any(re.search(pattern, name) for pattern in patterns):
            return name
    return f"model.layers.{layers}." if predicting_layers(model.config) else None


def add_predicting(model, folder):
    "Add a layer for multi-token prediction to a saved checkpoint, if its family has such; whether it has"
    prefix, file = predicting_name(model), folder / "model.safetensors"
    if prefix is None:
        return False
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    tensors, added = load_file(file), {}
    for name, value in tensors.items():
        stack, found, rest = name.partition(f".layers.{layers - 1}.")
        if found and stack in ("model", "model.language_model"):
            added[f"{prefix}{rest}"] = value.clone()
    added[f"{prefix}eh_proj.weight"] = torch.rand(16, 32)
    save_file(tensors | added, file, metadata={"format": "pt"})
    return True


class Family:
    "One family and its tiny model; each method without underscore is a capability, in order, and raises where it fails"

    def __init__(self, model, folder, ratio=0.6):
        self.model = model
        self.folder = Path(folder)
        self.ratio = ratio
        self.differences = []  # of logits, as they were found
        self.ids = torch.arange(1, 65).view(2, 32) % 90
        generator = torch.Generator().manual_seed(0)
        self.calibration = list(torch.randint(1, 90, (4, 24), generator=generator))
        modules = tuple(find_experts(model))
        self.untouched = {}
        for name, value in model.state_dict().items():
            if not name.startswith(modules):
                self.untouched[name] = value.clone()
        model.save_pretrained(self.folder / "source")
        self.predicts = add_predicting(model, self.folder / "source")

    def _config(self, **changes):
        return CompressionConfig(ratio=self.ratio, rounds=2, **changes)

    def _loaded(self, name):
        return load_compressed_model(self.folder / name, device_map={"": "cpu"})

    def _near(self, found, expected, limit=1e-4):
        finite = expected.isfinite().all() and expected.abs().max() > 0
        assert finite, "the model itself gives no finite logits"
        self.differences.append(difference(found, expected))
        assert self.differences[-1] < limit, f"logits differ by {self.differences[-1]:.1e}"

    def transformers(self):
        "transformers saves and loads it itself"
        again = type(self.model).from_pretrained(self.folder / "source", dtype=torch.float32)
        same = torch.equal(logits_of(again, self.ids), logits_of(self.model, self.ids))
        assert same, "transformers does not reload what it saved"

    def compress(self):
        copied = copy.deepcopy(self.model)
        self.compressed, self.statistics = compress_model(copied, self._config())
        self.logits = logits_of(self.compressed, self.ids)
        self.state = self.compressed.state_dict()
        assert all(torch.equal(value, self.state[name]) for name, value in self.untouched.items())
        assert self.statistics.expert_compression_ratio < 1

    def calibrate(self):
        copied, config = copy.deepcopy(self.model), self._config(refine_steps=4)
        self.calibrated, _ = compress_model(copied, config, self.calibration)
        assert logits_of(self.calibrated, self.ids).isfinite().all()

    def save(self):
        save_compressed_model(self.compressed, self.folder / "compressed")
        save_compressed_model(self.calibrated, self.folder / "calibrated")

    def load(self):
        loaded = self._loaded("compressed")
        assert torch.equal(logits_of(loaded, self.ids), self.logits)
        save_compressed_model(loaded, self.folder / "again")
        same_tensors(self.folder / "compressed", self.folder / "again")

    def from_pretrained(self):
        self.pretrained = type(self.model).from_pretrained(self.folder / "compressed")
        assert torch.equal(logits_of(self.pretrained, self.ids), self.logits)

    def train(self):
        "one step reaches every factor"
        model = self._loaded("compressed").train()
        prefixes = tuple(f"{module}." for module in compressed_experts(model))
        factors = {}
        for name, value in model.named_parameters():
            if name.startswith(prefixes) and value.numel():
                factors[name] = value
        before = {name: value.detach().clone() for name, value in factors.items()}
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        logits = model(self.ids, use_cache=False).logits
        F.cross_entropy(logits[:, :-1].flatten(0, 1), self.ids[:, 1:].flatten()).backward()
        optimizer.step()
        for name, value in factors.items():
            reached = value.grad is not None and value.grad.isfinite().all()
            assert reached and not torch.equal(value, before[name]), f"{name} was not trained"

    def wrappers(self):
        "the literal factors of the formula multiply out to the weights"
        experts = next(iter(compressed_experts(self.compressed).values()))
        for name, weights in experts.materialize().items():
            for literal, weight in zip(experts.wrappers(name), weights, strict=True):
                assert literal.error > 1e-3 or difference(literal.weight().float(), weight) < 1e-3

    def materialise(self):
        self._near(logits_of(self.pretrained.dequantize(), self.ids), self.logits)
        assert not compressed_experts(self.pretrained)
        assert find_experts(self.pretrained).keys() == find_experts(self.model).keys()

    def export(self):
        for name in ("compressed", "calibrated"):
            export_to_hf_format(self.folder / name, None, self.folder / f"{name}_exported")

    def reload(self):
        calibrated = logits_of(self.calibrated, self.ids)
        for name, expected in (("compressed", self.logits), ("calibrated", calibrated)):
            plain, report = type(self.model).from_pretrained(
                self.folder / f"{name}_exported", dtype=torch.float32, output_loading_info=True
            )
            assert not report["missing_keys"] and not report["unexpected_keys"], report
            assert type(plain) is type(self.model), report
            self._near(logits_of(plain, self.ids), expected)

    def stream(self):
        compress_checkpoint(self.folder / "source", self.folder / "streamed", self._config())
        streamed = self._loaded("streamed").state_dict()
        assert streamed.keys() == self.state.keys()
        assert all(torch.equal(value, self.state[name]) for name, value in streamed.items())

    def tensors_equal(self):
        "every tensor of the source is in the export: name, shape, data type, and the values outside the experts"
        export_to_hf_format(self.folder / "streamed", None, self.folder / "streamed_exported")
        wrong = lost_tensors(self.folder / "source", self.folder / "streamed_exported")
        first = ", ".join(f"{name} {problem}" for name, problem in list(wrong.items())[:2])
        assert not wrong, f"{len(wrong)} tensors: {first}"

    def stream_calibrated(self):
        "sums in another order round otherwise, so this is equal but for rounding"
        source, target = self.folder / "source", self.folder / "streamed_calibrated"
        compress_checkpoint(source, target, self._config(refine_steps=4), self.calibration)
        streamed = logits_of(self._loaded("streamed_calibrated"), self.ids)
        error = difference(streamed, logits_of(self.calibrated, self.ids))
        assert error < 1e-2, f"logits differ by {error:.1e}"


# The table

TICK, CROSS = "\N{CHECK MARK}", "\N{MULTIPLICATION SIGN}"
CAPABILITIES = [name for name in vars(Family) if not name.startswith("_")]

# Flag of a layout -> the value that is not the default, and what it is called
UNUSUAL = {
    "has_gate": (False, "no gate"),
    "has_bias": (True, "biases"),
    "is_transposed": (True, "transposed"),
    "is_concatenated": (False, "interleaved"),
    "has_post_expert_norm": (True, "norm after down"),
    "has_identity": (True, "identity experts"),
}


def layout_text(experts):
    "What differs from the default layout"
    layout = layout_of(experts)
    words = [text for flag, (value, text) in UNUSUAL.items() if getattr(layout, flag) == value]
    return ", ".join(words) or "default"


def reason_of(error):
    "What an error says, on one short line"
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words[:200] or 'no message'}"


def tried(family):
    "Capability -> tick or cross, as far as there is something to go on with; and capability -> what went wrong"
    marks, errors = {}, {}
    for name in CAPABILITIES:
        try:
            getattr(family, name)()
        except Exception as error:
            errors[name] = reason_of(error)
        if name == "compress" and errors:
            break
        marks[name] = CROSS if name in errors else TICK
    return marks, errors


def prove(model_type, overrides=None, model=None):
    """One row of the table: what was found, a tick or a cross for each capability, and the reason of every cross.

    `difference` is the largest difference of logits."""
    try:
        model = tiny_model(model_type, overrides) if model is None else model
    except Exception as error:
        return dict(family=model_type, reason=f"no tiny model: {reason_of(error)}")
    modules = find_experts(model).values()
    layouts = {type(module).__name__: layout_text(module) for module in modules}
    with tempfile.TemporaryDirectory() as folder:
        family = Family(model, folder)
        marks, errors = tried(family)
    reasons = []
    for name, error in errors.items():
        if not re.search("'Family'|compressed_metadata.json", error):  # not the consequences
            reasons.append(f"{name}: {error}")
    return dict(
        family=model_type,
        experts=" ".join(layouts),
        layout="; ".join(layouts.values()),
        layers=len(modules),
        predicting=TICK if family.predicts else "",
        **marks,
        difference=max(family.differences, default=None),
        reason="; ".join(reasons),
    )
