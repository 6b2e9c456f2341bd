"The command line as a process of its own: how soon it says what is missing, how it is stopped, what goes where."

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moe_nb.checkpoint import METADATA
from moe_nb.files import JOB, work_folder
from moe_nb.tiny import tiny_path

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
COMPRESS = ["compress", "--model", str(tiny_path()), "--ratio", "0.25", "--calibration", "none"]


def heed_interrupts():
    "A process in the background of a shell ignores Ctrl-C, and what it starts would too"
    signal.signal(signal.SIGINT, signal.default_int_handler)


def start(*words, python=()):
    "Start `moe-nb` with these words"
    return subprocess.Popen(
        [sys.executable, *python, "-m", "moe_nb.cli", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        preexec_fn=heed_interrupts,
    )


def run(*words, **options):
    "Exit code, output and errors of `moe-nb`"
    process = start(*words, **options)
    output, errors = process.communicate(timeout=600)
    return process.returncode, output, errors


@pytest.mark.parametrize(
    "words",
    [
        ["compress", "--model", "./none", "--output_dir", "x", "--ratio", "0.5"],
        ["distill", "--student_model_path", "/none", "--teacher_model", "a/b", "--output_dir", "x"],
        ["compress", "--model", "a/b", "--calibration", "none.jsonl", "--output_dir", "x"],
        ["evaluate", "--config", "none.yaml"],
        ["notebook", "none.ipynb"],
        ["melt"],
    ],
    ids=lambda words: words[0],
)
def test_what_is_missing_is_said_before_torch_is_imported(words):
    code, output, errors = run(*words, python=["-X", "importtime"])
    lines = [line for line in errors.splitlines() if not line.startswith("import time:")]
    imported = {line.rpartition("|")[2].strip() for line in errors.splitlines()}
    assert (code, output, len(lines)) == (2, "", 1) and lines[0].startswith("moe-nb: ")
    assert not imported & {"torch", "transformers", "pandas"}


SIGNALS = [
    (signal.SIGINT, 130),
    pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow),  # the same way
]


@pytest.mark.parametrize(("sent", "code"), SIGNALS)
def test_stopped_run_says_how_to_go_on_and_does(tmp_path, sent, code):
    output = tmp_path / "compressed"
    words = [*COMPRESS, "--output_dir", output, "--rounds", "10"]
    process = start(*words)
    while not (work_folder(output) / JOB).is_file() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(sent)
    _, errors = process.communicate(timeout=600)
    last = errors.strip().splitlines()[-1]
    assert process.returncode == code and "Traceback" not in errors
    assert last.startswith("moe-nb compress: stopped by ") and "same command goes on" in last
    assert str(work_folder(output)) in last and not output.exists()
    code, _, errors = run(*words)
    assert code == 0 and "going on with the work" in errors and (output / METADATA).is_file()


def test_json_is_alone_on_standard_output():
    code, output, _ = run("plan", "--model", tiny_path(), "--ratio", "0.25", "--json")
    assert code == 0 and json.loads(output)["layers"] == 4


def test_fault_of_ours_keeps_its_traceback(monkeypatch, capsys):
    from moe_nb import cli

    monkeypatch.setitem(cli.COMMANDS, "plan", lambda argv: {}["missing"])
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan"])
    said = capsys.readouterr().err
    assert ended.value.code == 1 and "KeyError" in said and "fault of moe_nb" in said


def test_handlers_are_as_they_were():
    from moe_nb import cli

    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit):
        cli.main(["plan", "--model", "./none"])
    assert before == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))
