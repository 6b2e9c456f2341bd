"""Children that are killed: start one, kill -9 it at a moment or after a while, start it again until the work is done.

A child is a command (`start_command`) or a function in a forked process (`start_function`); all else takes either. It
leads a process group of its own, so that what it started can be killed with it, and what it prints goes to a file.
"""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

Child = subprocess.Popen | multiprocessing.process.BaseProcess


def start_command(
    command: list,  # Program and arguments
    log: Path,  # What it prints is added here
    environment: dict | None = None,  # In place of this process's own
) -> Child:
    "Start a command, without waiting for it"
    with open(log, "a") as file:
        return subprocess.Popen(
            [str(part) for part in command],
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def start_function(
    function: Callable,  # Called in a process forked from this one
    *arguments,
    log: Path,  # What it prints is added here
) -> Child:
    "Start a function in a process of its own, without waiting for it"

    def child():
        os.setsid()
        sys.stdout = sys.stderr = open(log, "a", buffering=1)  # stays open for the last traceback
        for stream in (1, 2):
            os.dup2(sys.stderr.fileno(), stream)
        function(*arguments)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    return process


def exit_code(
    child: Child,
    seconds: float | None = None,  # To wait; None: until it ends
) -> int | None:
    "Exit code of a child, -9 for a killed one; None where it still runs after `seconds`"
    if isinstance(child, subprocess.Popen):
        try:
            return child.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
    child.join(seconds)
    return child.exitcode


def finish(child: Child, log: Path, seconds: float = 600) -> None:
    "Wait for a child; fail with the end of its log unless it ends well"
    code = exit_code(child, seconds)
    if code is None:
        kill(child)
    assert code == 0, f"exit code {code}:\n{log.read_text()[-3000:]}"


def kill(
    child: Child,
    alone: bool = False,  # What it started must end by itself
) -> None:
    "kill -9, and wait until the child is gone"
    try:
        (os.kill if alone else os.killpg)(child.pid, signal.SIGKILL)
    except ProcessLookupError:  # ended already, or not yet the leader of a group
        child.kill()
    exit_code(child)


def until(condition: Callable, seconds: float = 180) -> None:
    "Wait until `condition()` holds; fail after `seconds`"
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.001)


def kill_when(
    child: Child,
    condition: Callable,  # Says that the moment has come
    alone: bool = False,  # What it started must end by itself
) -> None:
    "kill -9 as soon as `condition()` holds; fail where the child ends before"
    until(lambda: condition() or exit_code(child, 0) is not None, seconds=600)
    code = exit_code(child, 0)
    assert code is None, f"the child ended with {code} before it was killed"
    kill(child, alone)


def kill_after(
    child: Child,
    seconds: float,
    log: Path,  # Of the child, to be shown
) -> bool:
    "kill -9 after `seconds`; False where the child ended before, which it must have done well"
    code = exit_code(child, seconds)
    if code is None:
        kill(child)
        return True
    assert code == 0, f"exit code {code}:\n{log.read_text()[-3000:]}"
    return False


def shares(
    seconds: float,  # That the undisturbed work takes
    low: float,  # Share of it
    high: float,  # Share of it
) -> Callable[[], float]:
    "Moments drawn between two shares of the time that the work takes; the same ones in every run"
    draw = random.Random(0)
    return lambda: draw.uniform(low, high) * seconds


def kill_and_resume(
    start: Callable[[], Child],  # Begins the work, or goes on with it
    *,
    log: Path,  # Of the children
    delay: Callable[[], float],  # Seconds until the next kill, of `shares`
    is_done: Callable[[], bool],  # Whether the work is complete
    start_over: Callable,  # Checks the complete work, and takes it away
    after_kill: Callable,  # Called after every kill
    kills: int = 20,
) -> int:
    """Kill the work `kills` times, each child going on where the one before was killed, and let the last one finish.

    Work that is complete before the last kill begins again; returns how often it did."""
    killed = beginnings = 0
    while killed < kills:
        if is_done():
            start_over()
            beginnings += 1
        if kill_after(start(), delay(), log):
            killed += 1
            after_kill()
    finish(start(), log)
    return beginnings
