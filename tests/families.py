"A tiny random model of any family of transformers, and everything that moe_nb can do run on it: shared by test_families.py and nbs/experiments/families.ipynb."

import copy
import re
import tempfile
from pathlib import Path

import torch
import transformers
from torch.nn import functional as F
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moe_nb.hf_names import bare_model
from moe_nb.shared_core import compressed_experts
from moe_nb.checkpoint import load_compressed_model, save_compressed_model
from moe_nb.layer import CompressionConfig
from moe_nb.compress import compress_model
from moe_nb.experts import find_experts, layout_of
from moe_nb.export import export_to_hf_format
from moe_nb.shards import open_source
from moe_nb.stream import compress_checkpoint

VOCABULARY = 128
SIZES = {  # Pattern of a field of a configuration -> its largest value; the first that matches the whole name counts
    r"(\w+_)?vocab_size(_\w+)?": VOCABULARY,
    r"max_position_embeddings|max_sequence_length|n_positions": 256,
    r"num_hidden_layers|num_layers|n_layers?|depth|(en|de)coder_layers|num_hidden_blocks": 3,
    r"first_k_dense_replace|num_dense_layers|moe_layer_start_index": 1,
    r"(num|n)_(experts|routed_experts|local_experts)|moe_num_experts|num_moe_experts": 4,
    r"num_experts_per_tok(en)?|moe_top_?k|top_k_experts|moe_k|num_selected_experts": 2,
    r"n_group|topk_group|num_expert_group|n_groups|n_shared_experts": 1,
    r"qk_head_dim": 16,
    r"(\w+_)?(intermediate|ffn_hidden|ffn)_(size|dim)(_\w+)?|n_inner": 12,
    r"(\w+_)?num_key_value_heads|n_kv_heads|num_kv_heads|((num|n)_)?(\w+_)?(attention_)?heads|index_n_heads|linear_num_(key|value)_heads": 2,
    r"(\w+_)?(kv|q|o)_lora_rank|index_topk|sliding_window(_size)?": 8,
    r"(\w+_)?head_dim": 8,
    r"(\w+_)?hidden_(size|dim)|d_model|n_embd|(\w+_)?embed_dim|emb_dim|dim|moe_latent_size|projection_dim|adapter_\w*(dim|size)": 16,
}


NONE = {
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "top_k_experts": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 12,
    "head_dim": 8,
}  # In place of None


def tiny_value(name, value):
    "`value` of the field `name`, made small if it is a size; token ids stay within the vocabulary"
    if value is None:
        return NONE.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        return value
    if re.fullmatch(r"\w*token_(id|index)", name):
        return value if value < VOCABULARY else VOCABULARY - 1 - len(name)
    return next(
        (min(value, tiny) for pattern, tiny in SIZES.items() if re.fullmatch(pattern, name)), value
    )


def tiny_config(config_class, overrides=None):
    "The default configuration of `config_class` with small sizes, and those of its parts; `overrides` have the last word"
    default, changes, overrides = config_class(), {}, dict(overrides or {})
    for name, value in vars(default).items():
        if isinstance(value, PreTrainedConfig):
            changes[name] = tiny_config(type(value), overrides.pop(name, None))
        elif name.endswith("token_id") and isinstance(value, list):
            changes[name] = [min(token, VOCABULARY - 1) for token in value]
        elif not name.startswith("_") and tiny_value(name, value) != value:
            changes[name] = tiny_value(name, value)
    return config_class(**changes | overrides)


def head_of(model_type):
    "Name of the class of transformers that generates text for `model_type`: a causal language model, or one that sees and hears too"
    kinds = (
        ("MULTIMODAL_LM", "IMAGE_TEXT_TO_TEXT", "CAUSAL_LM")
        if CONFIG_MAPPING[model_type].sub_configs
        else ("CAUSAL_LM", "MULTIMODAL_LM", "IMAGE_TEXT_TO_TEXT")
    )
    name = next(
        filter(
            None,
            (
                getattr(modeling_auto, f"MODEL_FOR_{kind}_MAPPING_NAMES").get(model_type)
                for kind in kinds
            ),
        )
    )
    return name if isinstance(name, str) else name[0]


def model_types():
    "Every `model_type` of transformers that has such a class and a configuration"
    names = {
        name
        for kind in ("CAUSAL_LM", "MULTIMODAL_LM", "IMAGE_TEXT_TO_TEXT")
        for name in getattr(modeling_auto, f"MODEL_FOR_{kind}_MAPPING_NAMES")
    }
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


class Family:
    "One family and its tiny model; each method without underscore is a capability, in order, and raises where it fails"

    def __init__(self, model, folder, ratio=0.6):
        self.model, self.folder, self.ratio, self.differences = model, Path(folder), ratio, []
        self.ids = torch.arange(1, 65).view(2, 32) % 90
        self.calibration = list(
            torch.randint(1, 90, (4, 24), generator=torch.Generator().manual_seed(0))
        )
        self.untouched = {
            name: value.clone()
            for name, value in model.state_dict().items()
            if not name.startswith(tuple(find_experts(model)))
        }
        model.save_pretrained(self.folder / "source")

    def _config(self, **changes):
        return CompressionConfig(ratio=self.ratio, rounds=2, **changes)

    def _near(self, found, expected, limit=1e-4):
        assert expected.isfinite().all() and expected.abs().max() > 0, (
            "the model itself gives no finite logits"
        )
        self.differences.append(difference(found, expected))
        assert self.differences[-1] < limit, f"logits differ by {self.differences[-1]:.1e}"

    def transformers(self):
        "transformers saves and loads it itself"
        again = type(self.model).from_pretrained(self.folder / "source", dtype=torch.float32)
        assert torch.equal(logits_of(again, self.ids), logits_of(self.model, self.ids)), (
            "transformers does not reload what it saved"
        )

    def compress(self):
        self.compressed, self.statistics = compress_model(copy.deepcopy(self.model), self._config())
        self.logits = logits_of(self.compressed, self.ids)
        self.state = self.compressed.state_dict()
        assert all(torch.equal(value, self.state[name]) for name, value in self.untouched.items())
        assert self.statistics.expert_compression_ratio < 1

    def calibrate(self):
        self.calibrated, statistics = compress_model(
            copy.deepcopy(self.model), self._config(refine_steps=4), self.calibration
        )
        assert logits_of(self.calibrated, self.ids).isfinite().all()

    def save(self):
        save_compressed_model(self.compressed, self.folder / "compressed")
        save_compressed_model(self.calibrated, self.folder / "calibrated")

    def load(self):
        loaded = load_compressed_model(self.folder / "compressed", device_map={"": "cpu"})
        assert torch.equal(logits_of(loaded, self.ids), self.logits)
        save_compressed_model(loaded, self.folder / "again")
        same_tensors(self.folder / "compressed", self.folder / "again")

    def from_pretrained(self):
        self.pretrained = type(self.model).from_pretrained(self.folder / "compressed")
        assert torch.equal(logits_of(self.pretrained, self.ids), self.logits)

    def train(self):
        model = load_compressed_model(self.folder / "compressed", device_map={"": "cpu"}).train()
        factors = {
            name: value
            for name, value in model.named_parameters()
            if any(name.startswith(f"{module}.") for module in compressed_experts(model))
            and value.numel()
        }
        before = {name: value.detach().clone() for name, value in factors.items()}
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        F.cross_entropy(
            model(self.ids, use_cache=False).logits[:, :-1].flatten(0, 1), self.ids[:, 1:].flatten()
        ).backward()
        optimizer.step()
        same = [
            name
            for name, value in factors.items()
            if value.grad is None
            or not value.grad.isfinite().all()
            or torch.equal(value, before[name])
        ]
        assert not same, f"{same[0]} was not trained"

    def wrappers(self):
        "the literal factors of the formula multiply out to the weights"
        experts = next(iter(compressed_experts(self.compressed).values()))
        for name, weights in experts.materialize().items():
            for literal, weight in zip(experts.wrappers(name), weights, strict=True):
                assert literal.error > 1e-3 or difference(literal.weight().float(), weight) < 1e-3

    def materialise(self):
        self._near(logits_of(self.pretrained.dequantize(), self.ids), self.logits)
        assert (
            not compressed_experts(self.pretrained)
            and find_experts(self.pretrained).keys() == find_experts(self.model).keys()
        )

    def export(self):
        for name in ("compressed", "calibrated"):
            export_to_hf_format(self.folder / name, None, self.folder / f"{name}_exported")

    def reload(self):
        for name, expected in (
            ("compressed", self.logits),
            ("calibrated", logits_of(self.calibrated, self.ids)),
        ):
            plain, report = type(self.model).from_pretrained(
                self.folder / f"{name}_exported", dtype=torch.float32, output_loading_info=True
            )
            assert (
                not report["missing_keys"]
                and not report["unexpected_keys"]
                and type(plain) is type(self.model)
            ), report
            self._near(logits_of(plain, self.ids), expected)

    def stream(self):
        compress_checkpoint(self.folder / "source", self.folder / "streamed", self._config())
        streamed = load_compressed_model(
            self.folder / "streamed", device_map={"": "cpu"}
        ).state_dict()
        assert streamed.keys() == self.state.keys() and all(
            torch.equal(value, self.state[name]) for name, value in streamed.items()
        )

    def stream_calibrated(self):
        "sums in another order round otherwise, so this is equal but for rounding"
        compress_checkpoint(
            self.folder / "source",
            self.folder / "streamed_calibrated",
            self._config(refine_steps=4),
            self.calibration,
        )
        streamed, expected = (
            load_compressed_model(self.folder / "streamed_calibrated", device_map={"": "cpu"}),
            logits_of(self.calibrated, self.ids),
        )
        error = difference(logits_of(streamed, self.ids), expected)
        assert error < 1e-2, f"logits differ by {error:.1e}"


TICK, CROSS = "\N{CHECK MARK}", "\N{MULTIPLICATION SIGN}"
CAPABILITIES = [name for name in vars(Family) if not name.startswith("_")]


def layout_text(experts):
    "What differs from the default layout"
    words = dict(
        has_gate=(False, "no gate"),
        has_bias=(True, "biases"),
        is_transposed=(True, "transposed"),
        is_concatenated=(False, "interleaved"),
        has_post_expert_norm=(True, "norm after down"),
        has_identity=(True, "identity experts"),
    )
    return (
        ", ".join(
            text
            for flag, (value, text) in words.items()
            if getattr(layout_of(experts), flag) == value
        )
        or "default"
    )


def reason_of(error):
    "What an error says, on one short line"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200] or 'no message'}"


def prove(model_type, overrides=None, model=None):
    "One row of the table: what was found, a tick or a cross for each capability, the largest difference of logits, and the reason of every cross"
    try:
        model = tiny_model(model_type, overrides) if model is None else model
    except Exception as error:
        return dict(family=model_type, reason=f"no tiny model: {reason_of(error)}")
    experts = {
        type(module).__name__: layout_text(module) for module in find_experts(model).values()
    }
    row, errors = (
        dict(
            family=model_type,
            experts=" ".join(experts),
            layout="; ".join(experts.values()),
            layers=len(find_experts(model)),
        ),
        {},
    )
    with tempfile.TemporaryDirectory() as folder:
        family = Family(model, folder)
        for name in CAPABILITIES:
            try:
                getattr(family, name)()
            except Exception as error:
                errors[name] = reason_of(error)
            if name == "compress" and errors:
                break  # nothing to go on with
            row[name] = CROSS if name in errors else TICK
    own = {
        name: error
        for name, error in errors.items()
        if not re.search("'Family'|compressed_metadata.json", error)
    }  # not the consequences
    return row | dict(
        difference=max(family.differences, default=None),
        reason="; ".join(f"{name}: {error}" for name, error in own.items()),
    )
