"""Checks that a check that fails leaves no jobs running: none of `jobs.py`, and none of `mpirun` if there is one."""

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jobs

deaf = "sleep 4711 & trap '' TERM; echo begun; sleep 4712; sleep 4713"
# Jobs, and the words by which what is left of them would be found.
cases = [
    (["sleep", "4710"], "4710"),
    # One that starts another, and does not listen.
    (["sh", "-c", deaf], "471"),
]
if shutil.which("mpirun"):
    more = ["--allow-run-as-root", "--oversubscribe"]
    cases.append((["mpirun", *more, "-n", "2", "sh", "-c", "yes & sleep 4714"], "4714"))


def running(word):
    """The sleeping processes whose arguments begin with these digits."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().decode().split("\0")
        except (OSError, UnicodeDecodeError):
            continue
        if words[0] == "sleep" and words[1].startswith(word):
            found.append(int(entry.name))
    return found


if len(sys.argv) > 1:
    # A check that is terminated while a job runs.
    jobs.end_when_terminated()
    jobs.run(["sleep", "4715"])
jobs.PATIENCE = 2
for command, word in cases:
    try:
        with jobs.started(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT):
            while not running(word):
                time.sleep(0.05)
            raise AssertionError("an early one")
    except AssertionError as error:
        assert str(error) == "an early one", error
    time.sleep(0.5)
    assert not running(word), f"{command} left {running(word)}"
try:
    jobs.run(["sleep", "4710"], timeout=1)
except subprocess.TimeoutExpired:
    assert not running("4710")
else:
    raise AssertionError("it has not taken too long")
with subprocess.Popen([sys.executable, __file__, "terminated"]) as check:
    while not running("4715"):
        time.sleep(0.05)
    check.send_signal(signal.SIGTERM)
    assert check.wait(timeout=30) == 143
assert not running("4715"), "a check that was terminated left its job"
assert jobs.run(["echo", "it"]) == (0, "it\n")
print("jobs end with their checks")
