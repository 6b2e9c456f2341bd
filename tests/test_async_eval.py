"""Evaluation under faults, each provoked for real.

Nothing is lost, doubled or wrong, the training is unharmed, and the queue is empty afterwards.
"""

import itertools
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

import harness
from harness import start_function, until
from moe_nb import async_eval, eval_worker, resume
from moe_nb.async_eval import CheckpointEvaluator, EvaluationFolder
from moe_nb.checkpoint import save_compressed_model
from moe_nb.compress import compress_model
from moe_nb.eval_queue import EvaluationConfig, best_of, queued, scores_by_name
from moe_nb.evaluate import evaluate_model
from moe_nb.export import export_to_hf_format
from moe_nb.files import read_lines, sha256
from moe_nb.layer import CompressionConfig
from moe_nb.resume import DONE, CompressedModelSaveCallback, checkpoints, publish, rotate
from moe_nb.tiny import load_tiny

FORK = multiprocessing.get_context("fork")

# Scorers and tasks that go wrong; `include_path` tells them where their marks are

SCORERS = """
import time
from pathlib import Path
import torch
from moe_nb.eval_worker import text_perplexity

def first_time(config, name):
    mark = Path(config.include_path) / name
    if mark.exists():
        return False
    mark.touch()
    return True

def gated(path, tasks, config):
    first_time(config, "waiting")
    while not (Path(config.include_path) / "go").exists():
        time.sleep(0.02)
    yield from text_perplexity(path, tasks, config)

def greedy(path, tasks, config):
    if first_time(config, "greedy"):
        torch.ones(2**34)
    yield from text_perplexity(path, tasks, config)
"""

TASK = """
import time
from pathlib import Path
from datasets import Dataset
from moe_nb.tiny import next_word_items, tiny_text

def first_time():
    mark = Path(__file__).with_name("mark")
    if mark.exists():
        return False
    mark.touch()
    return True

def documents(**_):
    if first_time():
        FAULT
    return {"test": Dataset.from_list(next_word_items(tiny_text("heldout"), count=4))}
"""

TASK_YAML = """
task: faulty
custom_dataset: !function faulty.documents
output_type: multiple_choice
test_split: test
num_fewshot: 0
doc_to_text: '{{context}}'
target_delimiter: ' '
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture(scope="module")
def students(tmp_path_factory):
    "Three compressed models with different weights"
    folder = tmp_path_factory.mktemp("students")
    model, tokenizer = load_tiny()
    quick = CompressionConfig(ratio=0.25, rounds=1, align_width=0, refine_steps=0)
    compressed = compress_model(model, quick)[0]
    for step in (2, 4, 6):
        generator = torch.Generator().manual_seed(step)
        with torch.no_grad():
            for parameter in compressed.parameters():
                if parameter.is_floating_point() and parameter.numel():
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter += 0.02 * parameter.std(correction=0) * noise
        save_compressed_model(compressed, folder / str(step), tokenizer)
    return folder


def config(**changes):
    "Quick settings: the perplexity of two documents, one further attempt"
    quick = dict(
        tasks=["embedded"],
        limit=2,
        scorer="moe_nb.eval_worker:text_perplexity",
        baselines=False,
        poll_interval=0.05,
        retries=1,
        backoff=0.05,
        timeout=120,
        nice=0,
    )
    return EvaluationConfig(**quick | changes)


def marked(run, scorer, **changes):
    "The same with one of `SCORERS`, which leaves its marks beside `run`"
    marks = str(run.parent / "marks")
    return config(scorer=f"faulty_scorers:{scorer}", include_path=marks, **changes)


@pytest.fixture(scope="module")
def reference(students, tmp_path_factory):
    "The score of a step by a back-end, computed in this process"
    folder = tmp_path_factory.mktemp("reference")

    @cache
    def perplexity_of(step, use_export):
        path = students / str(step)
        if use_export:
            path = export_to_hf_format(path, None, folder / str(step))
        ((_, records),) = eval_worker.text_perplexity(path, ["embedded"], config())
        return records["embedded"]["metrics"]["perplexity"]["value"]

    return perplexity_of


@pytest.fixture
def run(students, tmp_path, monkeypatch):
    "A finished training with three checkpoints, all published"
    folder, marks = tmp_path / "run", tmp_path / "marks"
    for step in (2, 4, 6):
        shutil.copytree(students / str(step), folder / f"checkpoint-{step}")
        publish(folder / f"checkpoint-{step}", folder / "eval_queue")
    (folder / "eval_queue" / DONE).touch()
    marks.mkdir()
    (marks / "faulty_scorers.py").write_text(SCORERS)
    paths = [str(marks), os.environ.get("PYTHONPATH")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    return folder


@pytest.fixture(autouse=True)
def named(request, record_property):
    "The docstring of a test is its name in the report"
    record_property("fault", request.function.__doc__)


def log_file(run):
    "Where the evaluators of `run` write to"
    return run.parent / "log.txt"


def log(run):
    "What the evaluators of `run` wrote"
    return log_file(run).read_text()


def evaluate(run, configuration, prepare):
    "What an evaluator does; its log goes where it prints to"
    logging.basicConfig(stream=sys.stderr, force=True)
    prepare()
    with async_eval.ending_orderly():
        CheckpointEvaluator(run, configuration).run()


def start(run, configuration, prepare=lambda: None):
    "An evaluator in a process of its own; `prepare` runs there first"
    return start_function(evaluate, run, configuration, prepare, log=log_file(run))


def finish(run, configuration, prepare=lambda: None):
    "An evaluator that must end well"
    harness.finish(start(run, configuration, prepare), log_file(run), seconds=300)


def workers(run):
    "Processes of workers for `run` that are still there"

    def command(path):
        try:
            return path.read_bytes()
        except OSError:
            return b""

    found = Path("/proc").glob("[0-9]*/cmdline")
    return [path.parent.name for path in found if str(run).encode() in command(path)]


def kill(process, run):
    "kill -9 of the evaluator alone; its worker must follow by itself"
    harness.kill(process, alone=True)
    until(lambda: not workers(run), 30)  # at once, or when it has imported what it needs to notice


def rows(run):
    "The results so far"
    return read_lines(EvaluationFolder(run, config()).results)


def work(run, pattern):
    "What there is of jobs under way"
    return list((run / "eval_results" / "work").glob(pattern))


def check(run, reference, steps=(2, 4, 6), use_export=True):
    "Exactly the results of an undisturbed run, in order, and nothing left over"
    found, results = rows(run), run / "eval_results"
    assert [row["step"] for row in found] == list(steps), found
    for row in found:
        score = scores_by_name(row)["embedded/perplexity"]
        assert score["value"] == reference(row["step"], use_export)
    assert not queued(run / "eval_queue") and not work(run, "*") and not workers(run)
    best = json.loads((results / "best.json").read_text())
    assert best == best_of(found)
    assert sha256(results / "best" / "compressed_metadata.json") == best["sha256"]
    expected = {"results.jsonl", "best.json", "best", "work", "quarantine"}
    assert set(os.listdir(results)) <= expected
    return f"{len(found)} of {len(steps)} results, each once and right"


def unpublish(run, *steps):
    "Take entries out of the queue"
    for step in steps:
        shutil.rmtree(run / "eval_queue" / f"step-{step:08d}")


@pytest.fixture
def unharmed(run):
    "The checkpoints of the training are afterwards what they were"

    def listing():
        files = []
        for folder in checkpoints(run):
            files += [path for path in sorted(folder.rglob("*")) if path.is_file()]
        return {path: sha256(path) for path in files}

    before = listing()
    yield
    assert listing() == before


# Killed


def test_killed_during_evaluation(run, reference, unharmed, record_property):
    "evaluator killed -9 during evaluation"
    unpublish(run, 4, 6)
    settings = marked(run, "gated", use_export=False)
    process = start(run, settings)
    until((run.parent / "marks" / "waiting").exists)
    kill(process, run)
    assert not rows(run) and len(queued(run / "eval_queue")) == 1
    (run.parent / "marks" / "go").touch()
    finish(run, settings)
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

    derive = EvaluationFolder.derive_best

    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    def die_after_the_second(folder):
        if len(folder.rows()) == 2:
            die()
        derive(folder)

    def prepare():
        if moment == "settle":
            async_eval.settle = die
        else:
            EvaluationFolder.derive_best = die_after_the_second

    process = start(run, config(), prepare)
    process.join(300)
    assert process.exitcode == -signal.SIGKILL
    written, waiting = (1, 3) if moment == "settle" else (2, 2)
    assert len(rows(run)) == written and len(queued(run / "eval_queue")) == waiting
    finish(run, config())
    record_property("outcome", check(run, reference))


@pytest.mark.slow
def test_asked_to_end(run, reference, unharmed, record_property):
    "evaluator asked to end (SIGTERM) during evaluation"
    settings = marked(run, "gated")
    process = start(run, settings)
    until((run.parent / "marks" / "waiting").exists)
    process.terminate()
    process.join(10)
    assert process.exitcode == 143 and not workers(run) and not rows(run)
    (run.parent / "marks" / "go").touch()
    finish(run, settings)
    record_property("outcome", check(run, reference))


@pytest.mark.slow
def test_trainer_killed_during_publish(run, reference, unharmed, record_property):
    "trainer killed -9 during publish"
    queue = run / "eval_queue"
    unpublish(run, 6)
    (queue / DONE).unlink()

    def publishing():
        "The trainer: it dies when it has linked five files"
        linked, link = [], resume.link_or_copy

        def dying(source, target):
            link(source, target)
            linked.append(target)
            if len(linked) == 5:
                os.kill(os.getpid(), signal.SIGKILL)

        resume.link_or_copy = dying
        publish(run / "checkpoint-6", queue)

    evaluator = start(run, config())
    trainer = FORK.Process(target=publishing)
    trainer.start()
    trainer.join()
    assert trainer.exitcode == -signal.SIGKILL
    half_published = [
        *queue.glob(".step-00000006.tmp-*/*"),
        *queue.glob(".step-00000006.tmp-*/*/*"),
    ]
    assert len(half_published) >= 5
    until(lambda: len(rows(run)) == 2, 300)
    time.sleep(1)
    assert len(rows(run)) == 2 and evaluator.is_alive()  # what is half published is not looked at

    callback = CompressedModelSaveCallback()  # the training is resumed, and ends
    args = SimpleNamespace(output_dir=str(run))
    state = SimpleNamespace(is_world_process_zero=True, global_step=6)
    callback.on_train_begin(args, state, None)
    callback.on_train_end(args, state, None)
    evaluator.join(300)
    assert evaluator.exitcode == 0 and not list(queue.glob(".*"))
    record_property("outcome", check(run, reference))


# Rotation and damage


@pytest.mark.slow
def test_rotation_during_evaluation(run, reference, record_property):
    "rotation with save_total_limit=1 during evaluation"
    process = start(run, marked(run, "gated", use_export=False))
    until((run.parent / "marks" / "waiting").exists)
    for path in checkpoints(run):
        (path / resume.MARK).write_text("{}")  # as the Trainer's checkpoints have it
    rotate(run, 1, None)
    assert [path.name for path in checkpoints(run)] == ["checkpoint-6"]
    (run.parent / "marks" / "go").touch()
    process.join(300)
    assert process.exitcode == 0 and [path.name for path in checkpoints(run)] == ["checkpoint-6"]
    record_property("outcome", check(run, reference, use_export=False))


@pytest.mark.slow
def test_corrupted_shard(run, reference, unharmed, record_property):
    "corrupted shard (one byte, same size)"
    shard = Path("layer_1", "up_proj.safetensors")
    entry = run / "eval_queue" / "step-00000004"
    aside = run / "eval_results" / "quarantine"
    data = bytearray((entry / shard).read_bytes())
    data[len(data) // 2] ^= 1
    (entry / shard).unlink()  # a link: the checkpoint of the training stays whole
    (entry / shard).write_bytes(data)
    finish(run, config())
    assert "SHA-256 differs" in (aside / "step-00000004.txt").read_text()
    outcome = check(run, reference, steps=[2, 6])
    shutil.copy(run / "checkpoint-4" / shard, aside / entry.name / shard)
    (aside / entry.name).rename(entry)
    finish(run, config())
    check(run, reference, steps=[2, 6, 4])
    record_property(
        "outcome", f"{outcome}; the damaged one in quarantine, scored once it was repaired"
    )


# What lm-eval may do


def harness_tasks(run, fault, **changes):
    "A configuration with a task of lm-eval that goes wrong the first time"
    folder = run.parent / "tasks"
    folder.mkdir()
    (folder / "faulty.py").write_text(TASK.replace("FAULT", fault))
    (folder / "faulty.yaml").write_text(TASK_YAML)
    unpublish(run, 4, 6)
    return config(
        tasks=["tiny_perplexity", "faulty"],
        scorer="moe_nb.eval_worker:lm_eval_scores",
        include_path=str(folder),
        **changes,
    )


def check_harness(run, settings):
    "The one result, at the second attempt, is what `evaluate_model` says of the export"
    (row,) = rows(run)
    assert row["step"] == 2 and row["attempts"] == 2
    assert not queued(run / "eval_queue") and not work(run, "*")
    exported = export_to_hf_format(run / "checkpoint-2", None, run.parent / "exported")
    here = evaluate_model(exported, settings.tasks, limit=2, include_path=settings.include_path)
    expected = {}
    for task, values in here.items():
        for name, value in values.items():
            if name != "samples" and not name.endswith("_stderr"):
                expected[f"{task}/{name}"] = value
    found = {name: score["value"] for name, score in scores_by_name(row).items()}
    assert found == expected
    return "1 of 1 results, once and right, at the second attempt"


@pytest.mark.slow
def test_lm_eval_raises(run, unharmed, record_property):
    "lm-eval raises in the second task"
    settings = harness_tasks(run, "raise RuntimeError('no such luck')", backoff=1.0)
    process = start(run, settings)
    until(lambda: work(run, "*/task-0.json"), 120)
    (first_task,) = work(run, "*/task-0.json")
    written = first_task.stat().st_mtime_ns
    until((run.parent / "tasks" / "mark").exists)
    until(lambda: work(run, "*/task-1.json"), 120)
    assert first_task.stat().st_mtime_ns == written  # it is not done again
    process.join(120)
    assert process.exitcode == 0 and "no such luck" in log(run)
    record_property("outcome", check_harness(run, settings) + "; the finished task is kept")


@pytest.mark.slow
def test_lm_eval_hangs(run, unharmed, record_property):
    "lm-eval hangs"
    settings = harness_tasks(run, "time.sleep(10**6)", timeout=45)
    finish(run, settings)
    assert "no result after 45 s" in log(run) and not workers(run)
    record_property("outcome", check_harness(run, settings))


@pytest.mark.slow
def test_responses_are_never_shared(run, unharmed, record_property):
    "two checkpoints with different weights: no response is shared"
    unpublish(run, 6)
    again = run / "again"
    by_lm_eval = dict(scorer="moe_nb.eval_worker:lm_eval_scores", use_export=False)
    words = config(tasks=["tiny_next_word"], limit=20, **by_lm_eval)
    documents = config(tasks=["tiny_perplexity"], **by_lm_eval)
    for step in (2, 4):
        publish(run / f"checkpoint-{step}", again / "eval_queue")
    (again / "eval_queue" / DONE).touch()
    finish(run, words)
    finish(again, documents)
    for folder, settings in ((run, words), (again, documents)):
        for row in rows(folder):
            (task,) = row["tasks"]
            here = evaluate_model(run / row["checkpoint"], [task], limit=settings.limit)[task]
            for name, score in row["tasks"][task]["metrics"].items():
                assert score["value"] == here[name]
    perplexities = set()
    for row in rows(again):
        perplexities.add(scores_by_name(row)["tiny_perplexity/word_perplexity"]["value"])
    assert len(perplexities) == 2
    shutil.rmtree(again)
    record_property("outcome", "each scored as by itself, and differently")


# Resources


@pytest.mark.slow
def test_worker_out_of_memory(run, reference, unharmed, record_property):
    "worker out of memory (bounded address space)"
    finish(run, marked(run, "greedy", memory_limit=16.0))
    assert "allocate" in log(run) and rows(run)[0]["attempts"] == 2
    record_property("outcome", check(run, reference) + ", the first at the second attempt")


@pytest.mark.slow
def test_disk_full_while_exporting(run, reference, unharmed, record_property):
    "disk full while exporting (a file may have 1 MB until the second attempt)"

    def limit_files(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    def lift(seconds):
        limit_files(resource.RLIM_INFINITY)

    def prepare():
        limit_files(10**6)
        async_eval.time = SimpleNamespace(sleep=lift, monotonic=time.monotonic)

    finish(run, config(), prepare)
    assert "File too large" in log(run) and rows(run)[0]["attempts"] == 2
    record_property("outcome", check(run, reference) + ", the first at the second attempt")


# Two at once, and the clock


@pytest.mark.slow
def test_two_evaluators(run, reference, unharmed, record_property):
    "two evaluators started at once"
    both = [start(run, config()) for _ in range(2)]
    for process in both:
        process.join(300)
    assert sorted(process.exitcode for process in both) == [0, 1]
    assert "is being evaluated already" in log(run)
    record_property("outcome", check(run, reference) + "; the second is refused")


@pytest.mark.slow
def test_clock_jumps_backwards(run, reference, unharmed, record_property):
    "clock jumps backwards, file dates in the wrong order"
    for age, path in enumerate(queued(run / "eval_queue").values()):
        date = 2e9 - age * 1e6
        os.utime(path, (date, date))

    def prepare():
        now = [2e9]

        def backwards():
            now[0] -= 1e5
            return now[0]

        time.time = backwards

    finish(run, config(timeout=60), prepare)
    record_property("outcome", check(run, reference) + ", in the order of the steps")


# A hundred kills

OPERATIONS = "write fsync replace rename ftruncate truncate unlink rmdir mkdir".split()


def killed_at(number):
    "Patch the file operations of this process so that it is killed at the given one, before or after it"
    numbers = itertools.count(1)

    def counted(function):
        def call(*args, **kwargs):
            last = next(numbers) == number
            if last and number % 2:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*args, **kwargs)
            if last:
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
        queue = tmp_path / name / "eval_queue"
        for path in checkpoints(tmp_path / "models"):
            publish(path, queue)
        (queue / DONE).touch()
        return tmp_path / name

    def scores(run):
        return [(row["step"], row["sha256"], row["tasks"]) for row in rows(run)]

    whole = new_run("whole")
    begun = time.monotonic()
    finish(whole, config())
    seconds_of_one = (time.monotonic() - begun) / 10
    expected = scores(whole)
    assert [step for step, *_ in expected] == list(range(10))
    assert len({json.dumps(tasks) for *_, tasks in expected}) == 10

    draw = random.Random(0)
    kills, runs = 0, 1
    results_at_kill = []
    run = new_run("killed-1")
    while kills < 100:
        number = draw.randrange(1, 60)
        moment = draw.uniform(0, 1.5) * seconds_of_one
        by_operation = kills % 2
        if by_operation:
            process = start(run, config(), lambda: killed_at(number))
            process.join(300)
        else:
            process = start(run, config())
            process.join(moment)
        if process.exitcode == 0:
            assert scores(run) == expected and not queued(run / "eval_queue")
            runs += 1
            run = new_run(f"killed-{runs}")
            continue
        if by_operation:
            assert process.exitcode == -signal.SIGKILL, log(run)[-3000:]
        if process.exitcode is None:
            process.kill()  # the next one starts at once, whether the worker of this one is gone or not
            process.join()
        kills += 1
        results_at_kill.append(len(rows(run)))
        assert scores(run) == expected[: len(rows(run))], log(run)[-3000:]
    finish(run, config())
    assert scores(run) == expected and not queued(run / "eval_queue") and not work(run, "*")
    until(lambda: not workers(tmp_path), 30)
    fewest, most = min(results_at_kill), max(results_at_kill)
    record_property(
        "outcome",
        f"{runs} runs, {kills} kills after {fewest} to {most} results; "
        "10 of 10 results in each, equal to the last digit",
    )
