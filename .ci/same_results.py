"""What fixed seeds give, as hashes: run it before and after a change that should change no result, and compare.

python .ci/same_results.py before.json           # in one checkout
python .ci/same_results.py after.json            # in another
python .ci/same_results.py --compare before.json after.json
"""

import hashlib
import inspect
import json
import os
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    TQDM_DISABLE="1",
    OMP_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
)


def weights_of(folder):
    "File -> SHA-256, for what a directory holds of weights and statistics"
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix in (".safetensors", ".pt", ".yaml")
    ]
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def calibration(tokenizer, count):
    "The first sequences of the calibration text"
    from moe_nb import tiny_text, token_sequences

    return token_sequences(tokenizer, tiny_text("calibration"), length=128, limit=count)


def compressed_models(folder):
    "Every way to fit a model in memory, each with its export"
    from moe_nb import (
        CompressionConfig,
        compress_model,
        export_to_hf_format,
        load_tiny,
        save_compressed_model,
    )

    runs = {
        "calibrated": (dict(ratio=0.25, refine_steps=20), 16, False, "safetensors"),
        "calibrated_upcycled": (
            dict(ratio=0.2, rounds=3, refine_steps=0, rank_multiple=4),
            8,
            True,
            "safetensors",
        ),
        "data_free": (dict(ratio=0.3, rounds=2), 0, False, "pt"),
        "partly": (
            dict(
                ratio=0.5,
                rounds=2,
                projections=["up_proj", "down_proj"],
                layers=[1],
                dtype="float32",
            ),
            8,
            False,
            "safetensors",
        ),
        "rank": (dict(rank=3, rounds=2), 0, False, "safetensors"),
        "adam": (dict(ratio=0.3, method="adam", steps=20), 0, False, "safetensors"),
    }
    for name, (settings, count, upcycled, weights_format) in runs.items():
        model, tokenizer = load_tiny(upcycled=upcycled)
        sequences = calibration(tokenizer, count) if count else None
        compressed, _ = compress_model(model, CompressionConfig(**settings), sequences)
        save_compressed_model(compressed, folder / name, tokenizer, weights_format=weights_format)
        export_to_hf_format(folder / name, None, folder / f"{name}_exported", max_shard_size="3MB")
        yield name, weights_of(folder / name)
        yield f"{name}, exported", weights_of(folder / f"{name}_exported")


def streamed_models(folder):
    "The same by streaming"
    from moe_nb import CompressionConfig, compress_checkpoint, load_tiny, tiny_path

    tokenizer = load_tiny()[1]
    for name, count in (("streamed", 0), ("streamed, calibrated", 16)):
        config = CompressionConfig(ratio=0.25, rounds=3, refine_steps=10)
        compress_checkpoint(
            tiny_path(),
            folder / name,
            config,
            calibration(tokenizer, count) if count else None,
            max_shard_size="2MB",
        )
        yield name, weights_of(folder / name)


def distilled_model(folder):
    "Both stages of a distillation, and stored targets"
    from moe_nb import tiny_path
    from moe_nb.distill import DistillationConfig, distill

    for name, changes in (
        ("distilled", {}),
        ("distilled from targets", dict(targets=str(folder / "targets"))),
    ):
        config = DistillationConfig(
            teacher_model=str(tiny_path()),
            student_model_path=str(folder / "calibrated"),
            output_dir=str(folder / name),
            max_length=128,
            max_tokens=8192,
            block_steps=5,
            max_steps=6,
            save_steps=3,
            warmup_steps=2,
            **changes,
        )
        yield name, weights_of(distill(config))
    yield "targets", weights_of(folder / "targets")


def baseline_models():
    "Perplexity of every method of the comparison, on little data"
    from moe_nb import load_tiny, perplexity, tiny_text
    from moe_nb.baselines import BASELINES, gather

    for name, method in BASELINES.items():
        model, tokenizer = load_tiny()
        few = {"steps": 50} if "steps" in inspect.signature(method).parameters else {}
        method(model, 0.3, gather(model, calibration(tokenizer, 8)), **few)
        yield f"baseline {name}", repr(perplexity(model, tokenizer, tiny_text("heldout")[:8]))


def families(folder):
    "Layouts of experts that the embedded model does not have"
    import torch

    from families import tiny_model
    from moe_nb import CompressionConfig, compress_model, export_to_hf_format, save_compressed_model

    for family in ("gpt_oss", "mixtral", "deepseek_v3", "qwen2_moe", "nemotron_h", "longcat_flash"):
        model = tiny_model(family)
        sequences = list(torch.randint(1, 90, (8, 64), generator=torch.Generator().manual_seed(0)))
        compressed, _ = compress_model(
            model, CompressionConfig(ratio=0.6, rounds=2, refine_steps=4), sequences
        )
        save_compressed_model(compressed, folder / family)
        export_to_hf_format(folder / family, None, folder / f"{family}_exported")
        yield family, weights_of(folder / family)
        yield f"{family}, exported", weights_of(folder / f"{family}_exported")


def results():
    "Name -> hashes of all of it"
    import torch

    torch.set_num_threads(1)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        parts = (
            compressed_models(folder),
            streamed_models(folder),
            distilled_model(folder),
            baseline_models(),
            families(folder),
        )
        for part in parts:
            start = time.time()
            for name, value in part:
                found[name] = value
                print(f"{name}  {time.time() - start:.0f} s", flush=True)
                start = time.time()
    return found


def main(argv):
    "Write the results, or compare two files of them"
    if argv[0] != "--compare":
        Path(argv[0]).write_text(json.dumps(results(), indent=1))
        return
    before, after = (json.loads(Path(path).read_text()) for path in argv[1:])
    differ = [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]
    print(
        "\n".join(f"differs: {name}" for name in sorted(differ))
        or f"all {len(before)} results are equal"
    )
    raise SystemExit(bool(differ))


if __name__ == "__main__":
    main(sys.argv[1:])
