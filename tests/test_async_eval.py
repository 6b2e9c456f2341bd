"Evaluation under faults, each provoked for real: nothing lost, nothing doubled, nothing wrong, the training unharmed, the queue empty."

import json
import logging
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import time
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from moe_nb import async_eval, eval_worker, resume
from moe_nb.async_eval import CheckpointEvaluator, EvaluationFolder
from moe_nb.checkpoint import save_compressed_model
from moe_nb.files import sha256
from moe_nb.layer import CompressionConfig
from moe_nb.compress import compress_model
from moe_nb.eval_queue import EvaluationConfig, best_of, queued
from moe_nb.files import read_lines
from moe_nb.evaluate import evaluate_model
from moe_nb.export import export_to_hf_format
from moe_nb.resume import DONE, CompressedModelSaveCallback, checkpoints, publish, rotate
from moe_nb.tiny import load_tiny

# Scorers and tasks that go wrong; `include_path` tells them where their marks are

SCORERS = """
import time
from pathlib import Path
import torch
from moe_nb.eval_worker import text_perplexity

def first_time(config, name):
    mark = Path(config.include_path) / name
    if mark.exists(): return False
    mark.touch()
    return True

def gated(path, tasks, config):
    first_time(config, "waiting")
    while not (Path(config.include_path) / "go").exists(): time.sleep(.02)
    yield from text_perplexity(path, tasks, config)

def greedy(path, tasks, config):
    if first_time(config, "greedy"): torch.ones(2**34)
    yield from text_perplexity(path, tasks, config)
"""

TASK = """
import time
from pathlib import Path
from datasets import Dataset
from moe_nb.tiny import next_word_items
from moe_nb.tiny import tiny_text

def first_time():
    mark = Path(__file__).with_name("mark")
    if mark.exists(): return False
    mark.touch()
    return True

def documents(**_):
    if first_time(): FAULT
    return {"test": Dataset.from_list(next_word_items(tiny_text("heldout"), count=4))}
"""


@pytest.fixture(scope="module")
def students(tmp_path_factory):
    "Three compressed models with different weights"
    folder = tmp_path_factory.mktemp("students")
    model, tokenizer = load_tiny()
    compressed = compress_model(
        model, CompressionConfig(ratio=0.25, rounds=1, align_width=0, refine_steps=0)
    )[0]
    for step in (2, 4, 6):
        generator = torch.Generator().manual_seed(step)
        with torch.no_grad():
            for parameter in compressed.parameters():
                if parameter.is_floating_point() and parameter.numel():
                    parameter += (
                        0.02
                        * parameter.std(correction=0)
                        * torch.randn(parameter.shape, generator=generator)
                    )
        save_compressed_model(compressed, folder / str(step), tokenizer)
    return folder


def config(**changes):
    return EvaluationConfig(
        **dict(
            dict(
                tasks=["embedded"],
                limit=2,
                scorer="moe_nb.eval_worker:text_perplexity",
                baselines=False,
                poll_interval=0.05,
                retries=1,
                backoff=0.05,
                timeout=120,
                nice=0,
            ),
            **changes,
        )
    )


@pytest.fixture(scope="module")
def reference(students, tmp_path_factory):
    "The score of a step by a back-end, computed in this process"
    folder = tmp_path_factory.mktemp("reference")

    @cache
    def perplexity_of(step, use_export):
        path = (
            export_to_hf_format(students / str(step), None, folder / str(step))
            if use_export
            else students / str(step)
        )
        return dict(eval_worker.text_perplexity(path, ["embedded"], config()))["embedded"][
            "embedded"
        ]["metrics"]["perplexity"]["value"]

    return perplexity_of


@pytest.fixture
def run(students, tmp_path, monkeypatch):
    "A finished training with three checkpoints, all published"
    for step in (2, 4, 6):
        shutil.copytree(students / str(step), tmp_path / "run" / f"checkpoint-{step}")
    for path in checkpoints(tmp_path / "run"):
        publish(path, tmp_path / "run" / "eval_queue")
    (tmp_path / "run" / "eval_queue" / DONE).touch()
    (tmp_path / "marks").mkdir()
    (tmp_path / "marks" / "faulty_scorers.py").write_text(SCORERS)
    monkeypatch.setenv(
        "PYTHONPATH",
        os.pathsep.join(filter(None, [str(tmp_path / "marks"), os.environ.get("PYTHONPATH")])),
    )
    return tmp_path / "run"


@pytest.fixture(autouse=True)
def named(request, record_property):
    record_property("fault", request.function.__doc__)


def child(run, configuration, prepare):
    sys.stdout = sys.stderr = open(run.parent / "log.txt", "a", buffering=1)
    os.dup2(sys.stderr.fileno(), 1), os.dup2(sys.stderr.fileno(), 2)
    logging.basicConfig(stream=sys.stderr, force=True)
    prepare()
    with async_eval.ending_orderly():
        CheckpointEvaluator(run, configuration).run()


def start(run, configuration, prepare=lambda: None):
    "An evaluator in a process of its own; `prepare` runs there first"
    process = multiprocessing.get_context("fork").Process(
        target=child, args=(run, configuration, prepare)
    )
    process.start()
    return process


def finish(run, configuration, prepare=lambda: None):
    process = start(run, configuration, prepare)
    process.join(300)
    assert process.exitcode == 0, (run.parent / "log.txt").read_text()[-3000:]


def workers(run):
    "Processes of workers for `run` that are still there"

    def command(path):
        try:
            return path.read_bytes()
        except OSError:
            return b""

    return [
        path.parent.name
        for path in Path("/proc").glob("[0-9]*/cmdline")
        if str(run).encode() in command(path)
    ]


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.001)


def kill(process, run):
    "kill -9 of the evaluator alone; its worker must follow by itself"
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    until(lambda: not workers(run), 30)  # at once, or when it has imported what it needs to notice


def rows(run):
    return read_lines(EvaluationFolder(run, config()).results)


def work(run, pattern):
    return list((run / "eval_results" / "work").glob(pattern))


def check(run, reference, steps=(2, 4, 6), use_export=True):
    "Exactly the results of an undisturbed run, in order, and nothing left over"
    found = rows(run)
    assert [row["step"] for row in found] == list(steps), found
    assert all(
        row["tasks"]["embedded"]["metrics"]["perplexity"]["value"]
        == reference(row["step"], use_export)
        for row in found
    )
    assert not queued(run / "eval_queue") and not work(run, "*") and not workers(run)
    best = json.loads((run / "eval_results" / "best.json").read_text())
    assert (
        best == best_of(found)
        and sha256(run / "eval_results" / "best" / "compressed_metadata.json") == best["sha256"]
    )
    assert {path.name for path in (run / "eval_results").iterdir()} <= {
        "results.jsonl",
        "best.json",
        "best",
        "work",
        "quarantine",
    }
    return f"{len(found)} of {len(steps)} results, each once and right"


@pytest.fixture
def unharmed(run):
    "The checkpoints of the training are afterwards what they were"

    def listing():
        return {
            path: sha256(path)
            for folder in checkpoints(run)
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }

    before = listing()
    yield
    assert listing() == before


# Killed


def test_killed_during_evaluation(run, reference, unharmed, record_property):
    "evaluator killed -9 during evaluation"
    for step in (4, 6):
        shutil.rmtree(run / "eval_queue" / f"step-0000000{step}")
    settings = dict(
        scorer="faulty_scorers:gated", include_path=str(run.parent / "marks"), use_export=False
    )
    process = start(run, config(**settings))
    until((run.parent / "marks" / "waiting").exists)
    kill(process, run)
    assert not rows(run) and len(queued(run / "eval_queue")) == 1
    (run.parent / "marks" / "go").touch()
    finish(run, config(**settings))
    record_property("outcome", check(run, reference, steps=[2], use_export=False))


@pytest.mark.slow
def test_killed_during_export(run, reference, unharmed, record_property):
    "evaluator killed -9 during export"
    process = start(run, config())
    until(lambda: work(run, "*/.export.partial"))
    kill(process, run)
    assert work(run, "*/.export.partial") and not rows(run)
    finish(run, config())
    record_property("outcome", check(run, reference))


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["settle", "derive_best"])
def test_killed_between_result_and_queue(run, reference, unharmed, record_property, moment):
    "evaluator killed -9 between result and queue update"

    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    def prepare():
        if moment == "settle":
            async_eval.settle = die
        else:
            derive = EvaluationFolder.derive_best
            EvaluationFolder.derive_best = lambda self: (
                die() if self.results.is_file() and len(self.rows()) == 2 else derive(self)
            )

    process = start(run, config(), prepare)
    process.join(300)
    assert process.exitcode == -signal.SIGKILL and len(rows(run)) == (
        1 if moment == "settle" else 2
    )
    assert len(queued(run / "eval_queue")) == (3 if moment == "settle" else 2)
    finish(run, config())
    record_property("outcome", check(run, reference))


@pytest.mark.slow
def test_asked_to_end(run, reference, unharmed, record_property):
    "evaluator asked to end (SIGTERM) during evaluation"
    settings = dict(scorer="faulty_scorers:gated", include_path=str(run.parent / "marks"))
    process = start(run, config(**settings))
    until((run.parent / "marks" / "waiting").exists)
    process.terminate()
    process.join(10)
    assert process.exitcode == 143 and not workers(run) and not rows(run)
    (run.parent / "marks" / "go").touch()
    finish(run, config(**settings))
    record_property("outcome", check(run, reference))


@pytest.mark.slow
def test_trainer_killed_during_publish(run, reference, unharmed, record_property):
    "trainer killed -9 during publish"
    queue = run / "eval_queue"
    shutil.rmtree(queue / "step-00000006"), (queue / DONE).unlink()

    def publishing():
        linked, link = [], resume.link

        def dying(source, target):
            link(source, target)
            linked.append(target)
            if len(linked) == 5:
                os.kill(os.getpid(), signal.SIGKILL)

        resume.link = dying
        publish(run / "checkpoint-6", queue)

    evaluator, trainer = (
        start(run, config()),
        multiprocessing.get_context("fork").Process(target=publishing),
    )
    trainer.start()
    trainer.join()
    assert (
        trainer.exitcode == -signal.SIGKILL
        and len(list(queue.glob(".tmp-6-*/*"))) + len(list(queue.glob(".tmp-6-*/*/*"))) >= 5
    )
    until(lambda: len(rows(run)) == 2)
    time.sleep(1)
    assert len(rows(run)) == 2 and evaluator.is_alive()  # what is half published is not looked at
    callback, state = (
        CompressedModelSaveCallback(),
        SimpleNamespace(is_world_process_zero=True, global_step=6),
    )
    for event in (callback.on_train_begin, callback.on_train_end):
        event(
            SimpleNamespace(output_dir=str(run)), state, None
        )  # the training is resumed, and ends
    evaluator.join(300)
    assert evaluator.exitcode == 0 and not list(queue.glob(".*"))
    record_property("outcome", check(run, reference))


# Rotation and damage


@pytest.mark.slow
def test_rotation_during_evaluation(run, reference, record_property):
    "rotation with save_total_limit=1 during evaluation"
    settings = dict(
        scorer="faulty_scorers:gated", include_path=str(run.parent / "marks"), use_export=False
    )
    process = start(run, config(**settings))
    until((run.parent / "marks" / "waiting").exists)
    rotate(run, 1, None)
    assert [path.name for path in checkpoints(run)] == ["checkpoint-6"]
    (run.parent / "marks" / "go").touch()
    process.join(300)
    assert process.exitcode == 0 and [path.name for path in checkpoints(run)] == ["checkpoint-6"]
    record_property("outcome", check(run, reference, use_export=False))


@pytest.mark.slow
def test_corrupted_shard(run, reference, unharmed, record_property):
    "corrupted shard (one byte, same size)"
    shard = run / "eval_queue" / "step-00000004" / "layer_1" / "up_proj.safetensors"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.unlink()  # a link: the checkpoint of the training stays whole
    shard.write_bytes(data)
    finish(run, config())
    assert (
        "SHA-256 differs" in (run / "eval_results" / "quarantine" / "step-00000004.txt").read_text()
    )
    outcome = check(run, reference, steps=[2, 6])
    shutil.copy(
        run / "checkpoint-4" / "layer_1" / "up_proj.safetensors",
        run / "eval_results" / "quarantine" / "step-00000004" / "layer_1" / "up_proj.safetensors",
    )
    (run / "eval_results" / "quarantine" / "step-00000004").rename(
        run / "eval_queue" / "step-00000004"
    )
    finish(run, config())
    check(run, reference, steps=[2, 6, 4])
    record_property(
        "outcome", f"{outcome}; the damaged one in quarantine, scored once it was repaired"
    )


# What lm-eval may do


def harness(run, fault, **changes):
    "A configuration with a task of lm-eval that goes wrong the first time"
    folder = run.parent / "tasks"
    folder.mkdir()
    (folder / "faulty.py").write_text(TASK.replace("FAULT", fault))
    (folder / "faulty.yaml").write_text(
        "task: faulty\ncustom_dataset: !function faulty.documents\noutput_type: multiple_choice\ntest_split: test\nnum_fewshot: 0\ndoc_to_text: '{{context}}'\ntarget_delimiter: ' '\n"
        "doc_to_choice: choices\ndoc_to_target: answer\nmetric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
    )
    for step in (4, 6):
        shutil.rmtree(run / "eval_queue" / f"step-0000000{step}")
    return config(
        **dict(
            dict(
                tasks=["tiny_perplexity", "faulty"],
                scorer="moe_nb.eval_worker:lm_eval_scores",
                include_path=str(folder),
            ),
            **changes,
        )
    )


def check_harness(run, settings):
    (row,), exported = (
        rows(run),
        export_to_hf_format(run / "checkpoint-2", None, run.parent / "exported"),
    )
    here = evaluate_model(exported, settings.tasks, limit=2, include_path=settings.include_path)
    assert (
        row["step"] == 2
        and row["attempts"] == 2
        and not queued(run / "eval_queue")
        and not work(run, "*")
    )
    assert {
        (task, name): score["value"]
        for task, record in row["tasks"].items()
        for name, score in record["metrics"].items()
    } == {
        (task, name): value
        for task, values in here.items()
        for name, value in values.items()
        if name != "samples" and not name.endswith("_stderr")
    }
    return "1 of 1 results, once and right, at the second attempt"


@pytest.mark.slow
def test_lm_eval_raises(run, unharmed, record_property):
    "lm-eval raises in the second task"
    settings = harness(run, "raise RuntimeError('no such luck')", backoff=1.0)
    process = start(run, settings)
    until(lambda: work(run, "*/task-0.json"), 120)
    kept = work(run, "*/task-0.json")[0].stat().st_mtime_ns
    until(lambda: (run.parent / "tasks" / "mark").exists())
    until(lambda: work(run, "*/task-1.json"), 120)
    assert (
        work(run, "*/task-0.json")[0].stat().st_mtime_ns == kept
    )  # the first task is not done again
    process.join(120)
    assert process.exitcode == 0 and "no such luck" in (run.parent / "log.txt").read_text()
    record_property("outcome", check_harness(run, settings) + "; the finished task is kept")


@pytest.mark.slow
def test_lm_eval_hangs(run, unharmed, record_property):
    "lm-eval hangs"
    settings = harness(run, "time.sleep(10**6)", timeout=45)
    finish(run, settings)
    assert "no result after 45 s" in (run.parent / "log.txt").read_text() and not workers(run)
    record_property("outcome", check_harness(run, settings))


@pytest.mark.slow
def test_responses_are_never_shared(run, unharmed, record_property):
    "two checkpoints with different weights: no response is shared"
    shutil.rmtree(run / "eval_queue" / "step-00000006")
    settings = config(
        tasks=["tiny_next_word"],
        limit=20,
        scorer="moe_nb.eval_worker:lm_eval_scores",
        use_export=False,
    )
    more = config(
        tasks=["tiny_perplexity"], scorer="moe_nb.eval_worker:lm_eval_scores", use_export=False
    )
    for step in (2, 4):
        publish(run / f"checkpoint-{step}", run / "again" / "eval_queue")
    finish(run, settings)
    (run / "again" / "eval_queue" / DONE).touch()
    finish(run / "again", more)
    for folder, settings in ((run, settings), (run / "again", more)):
        for row in rows(folder):
            (task,) = row["tasks"]
            here = evaluate_model(run / row["checkpoint"], [task], limit=settings.limit)[task]
            assert all(
                score["value"] == here[name]
                for name, score in row["tasks"][task]["metrics"].items()
            )
    perplexities = [
        row["tasks"]["tiny_perplexity"]["metrics"]["word_perplexity"]["value"]
        for row in rows(run / "again")
    ]
    assert len(set(perplexities)) == 2
    shutil.rmtree(run / "again")
    record_property("outcome", "each scored as by itself, and differently")


# Resources


@pytest.mark.slow
def test_worker_out_of_memory(run, reference, unharmed, record_property):
    "worker out of memory (bounded address space)"
    finish(
        run,
        config(
            scorer="faulty_scorers:greedy",
            include_path=str(run.parent / "marks"),
            memory_limit=16.0,
        ),
    )
    assert "allocate" in (run.parent / "log.txt").read_text() and rows(run)[0]["attempts"] == 2
    record_property("outcome", check(run, reference) + ", the first at the second attempt")


@pytest.mark.slow
def test_disk_full_while_exporting(run, reference, unharmed, record_property):
    "disk full while exporting (a file may have 1 MB until the second attempt)"

    def prepare():
        resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, resource.RLIM_INFINITY))

        def lift(seconds):
            resource.setrlimit(
                resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
            )

        async_eval.time = SimpleNamespace(sleep=lift)

    finish(run, config(), prepare)
    assert (
        "File too large" in (run.parent / "log.txt").read_text() and rows(run)[0]["attempts"] == 2
    )
    record_property("outcome", check(run, reference) + ", the first at the second attempt")


# Two at once, and the clock


@pytest.mark.slow
def test_two_evaluators(run, reference, unharmed, record_property):
    "two evaluators started at once"
    both = [start(run, config()) for _ in range(2)]
    for process in both:
        process.join(300)
    assert (
        sorted(process.exitcode for process in both) == [0, 1]
        and "is being evaluated already" in (run.parent / "log.txt").read_text()
    )
    record_property("outcome", check(run, reference) + "; the second is refused")


@pytest.mark.slow
def test_clock_jumps_backwards(run, reference, unharmed, record_property):
    "clock jumps backwards, file dates in the wrong order"
    for age, path in enumerate(queued(run / "eval_queue").values()):
        os.utime(path, (2e9 - age * 1e6,) * 2)

    def prepare():
        now = [2e9]

        def backwards():
            now[0] -= 1e5
            return now[0]

        time.time = backwards

    finish(run, config(timeout=60), prepare)
    record_property("outcome", check(run, reference) + ", in the order of the steps")


# A hundred kills

OPERATIONS = (
    "write",
    "fsync",
    "replace",
    "rename",
    "ftruncate",
    "truncate",
    "unlink",
    "rmdir",
    "mkdir",
)


def killed_at(number):
    "Patch the file operations of this process so that it is killed at the given one, before or after it"
    count = [0]

    def counted(function):
        def call(*args, **kwargs):
            count[0] += 1
            if count[0] == number and number % 2:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*args, **kwargs)
            if count[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    for name in OPERATIONS:
        setattr(os, name, counted(getattr(os, name)))


@pytest.mark.slow
def test_a_hundred_kills(students, tmp_path, record_property):
    "evaluator killed -9 at 100 random points of runs over 10 checkpoints"
    model, tokenizer = resume.stored_model(students / "2"), load_tiny()[1]
    for step in range(10):
        with torch.no_grad():
            model.lm_head.weight.mul_(1 + 0.01 * step)
        save_compressed_model(model, tmp_path / "models" / f"checkpoint-{step}", tokenizer)

    def new_run(name):
        for path in checkpoints(tmp_path / "models"):
            publish(path, tmp_path / name / "eval_queue")
        (tmp_path / name / "eval_queue" / DONE).touch()
        return tmp_path / name

    def scores(run):
        return [(row["step"], row["sha256"], row["tasks"]) for row in rows(run)]

    whole = new_run("whole")
    begun = time.monotonic()
    finish(whole, config())
    seconds = (time.monotonic() - begun) / 10
    expected, draw, kills, runs, at = scores(whole), random.Random(0), 0, 1, []
    assert [step for step, *_ in expected] == list(range(10)) and len(
        {json.dumps(tasks) for *_, tasks in expected}
    ) == 10
    run = new_run("killed-1")
    while kills < 100:
        by_operation = kills % 2
        number, moment = draw.randrange(1, 60), draw.uniform(0, 1.5) * seconds
        process = start(
            run, config(), (lambda: killed_at(number)) if by_operation else (lambda: None)
        )
        process.join(300 if by_operation else moment)
        if process.exitcode == 0:
            assert scores(run) == expected and not queued(run / "eval_queue")
            runs += 1
            run = new_run(f"killed-{runs}")
            continue
        if by_operation:
            assert process.exitcode == -signal.SIGKILL, (tmp_path / "log.txt").read_text()[-3000:]
        if process.exitcode is None:
            process.kill()  # the next evaluator starts at once, whether the worker of this one is gone or not
            process.join()
        kills += 1
        at.append(len(rows(run)))
        assert scores(run) == expected[: len(rows(run))]
    finish(run, config())
    assert scores(run) == expected and not queued(run / "eval_queue") and not work(run, "*")
    until(lambda: not workers(tmp_path), 30)
    record_property(
        "outcome",
        f"{runs} runs, {kills} kills after {min(at)} to {max(at)} results; 10 of 10 results in each, equal to the last digit",
    )
