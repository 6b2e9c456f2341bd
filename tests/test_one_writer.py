"Two runs into one output at random offsets, one of them stopped for a while or killed: one result, and nothing else."

import logging
import os
import random
import signal
import time
from collections import Counter

import pytest
from transformers import AutoModelForCausalLM

from harness import exit_code, kill, start_function
from moe_nb.checkpoint import METADATA, load_compressed_model
from moe_nb.cli import main
from moe_nb.export import EXPORT_RECORD
from moe_nb.files import sibling
from moe_nb.tiny import tiny_path

REFUSED = 2
KILLED = -signal.SIGKILL
DISTURBANCES = ("none", "none", "stopped", "killed")
REASONS = ("is being written already", "was completed by another process meanwhile")
QUICK = 3
MANY = 40


def command(*argv):
    "A command, with its warnings on standard error as outside of pytest"
    logging.getLogger().handlers.clear()
    main(list(argv))


def compress(output):
    "A small compression from the command line"
    flags = dict(ratio=0.5, rounds=1, layers=0, calibration="none", output_dir=output)
    command("compress", "--model", str(tiny_path()), *words(flags))


def export(output, source=None):
    "An export of `source` from the command line"
    command("export", *words(dict(model=source, output_dir=output)))


def words(flags):
    "Flags as the command line has them"
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def contents(folder):
    "File -> bytes, of a whole directory"
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    "Name -> what a run does, what marks its result, how it is loaded, the result of an undisturbed run, its seconds"
    found = {}
    folder = tmp_path_factory.mktemp("undisturbed")
    source = folder / "compressed"
    exported = folder / "exported"

    def export_source(output):
        export(output, source)

    todo = {
        "compress": (compress, source, METADATA, load_compressed_model),
        "export": (export_source, exported, EXPORT_RECORD, AutoModelForCausalLM.from_pretrained),
    }
    for name, (job, output, marker, load) in todo.items():
        begun = time.monotonic()
        assert exit_code(start_function(job, output, log=folder / "log")) == 0
        seconds = time.monotonic() - begun
        found[name] = (job, marker, load, contents(output), seconds)
    return found


def disturb(child, how, seconds):
    "Stop a run for `seconds`, or kill it; it may have ended"
    if how == "stopped":
        os.kill(child.pid, signal.SIGSTOP)
        time.sleep(seconds)
        os.kill(child.pid, signal.SIGCONT)
    elif how == "killed":
        kill(child)


def two_runs(job, folder, output, how, draw, seconds):
    "Exit codes and logs of two runs, the second begun while the first runs, about; `how` one of them is disturbed"
    logs = [folder / "first.log", folder / "second.log"]
    children = [start_function(job, output, log=logs[0])]
    time.sleep(draw.uniform(0, 0.7 * seconds))
    children.append(start_function(job, output, log=logs[1]))
    time.sleep(draw.uniform(0, 0.6 * seconds))
    disturb(draw.choice(children), how, draw.uniform(0, seconds))
    codes = [exit_code(child, 600) for child in children]
    return codes, [log.read_text() if log.exists() else "" for log in logs]


def kind_of_end(codes, logs):
    "What became of two runs: fails for what must not be"
    for code, log in zip(codes, logs):
        lines = [line for line in log.splitlines() if line.startswith("moe-nb:")]
        assert code in (0, REFUSED, KILLED), log
        assert code != REFUSED or (len(lines) == 1 and any(map(lines[0].count, REASONS))), log
        assert "Traceback" not in log, log
    complete = sum("is complete already" in log for log in logs)
    ends = sorted({0: "done", REFUSED: "refused", KILLED: "killed"}[code] for code in codes)
    if ends == ["done", "done"]:
        assert complete == 1, logs
        return "done, complete already"
    return ", ".join(ends)


@pytest.mark.parametrize("runs", [QUICK, pytest.param(MANY, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["compress", "export"])
def test_one_of_two_runs_writes(jobs, tmp_path, name, runs):
    job, marker, load, expected, seconds = jobs[name]
    draw = random.Random(0)
    ends = Counter()
    for run in range(runs):
        how = DISTURBANCES[run % len(DISTURBANCES)]
        folder = tmp_path / str(run)
        output = folder / "place" / "output"
        output.parent.mkdir(parents=True)
        codes, logs = two_runs(job, folder, output, how, draw, seconds)
        ends[kind_of_end(codes, logs)] += 1
        if 0 not in codes:  # the one that wrote was killed: the next one goes on
            assert KILLED in codes and not (output / marker).exists()
            again = start_function(job, output, log=folder / "third.log")
            assert exit_code(again, 600) == 0, (folder / "third.log").read_text()
        assert contents(output).keys() == expected.keys()
        assert [path.name for path in output.parent.iterdir()] == ["output"], ends
        assert not sibling(output, "lock").exists()
        load(output)
        for file, data in contents(output).items():
            assert file.endswith((".md", ".json")) or data == expected[file], file
    print(dict(ends))
    assert sum(ends.values()) == runs
