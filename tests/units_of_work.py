"""What workers do in `test_workers.py`; imports nothing, so that a process starts at once."""

import os
import signal
import time


def nothing() -> dict:
    return {"opened": True}


def own_process(_bench, _unit) -> tuple[int, str]:
    return os.getpid(), os.environ["OMP_NUM_THREADS"]


def slow_first(_bench, unit):
    time.sleep(0.3 if unit == 0 else 0)
    return unit


def kill_itself(_bench, unit):
    if unit == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return unit


def bad_value(_bench, unit):
    raise ValueError(f"{unit}: must be no unit; got one")


def bad_type(_bench, unit):
    return unit + "1"


def forever(_bench, path):
    with open(path, "w") as file:
        file.write(str(os.getpid()))
    time.sleep(600)
