"""Programs that end with the block that they were started in, whatever goes wrong there."""

import os
import signal
import subprocess
import sys
from contextlib import contextmanager

# How long a job may take to end when it is asked to, in seconds.
PATIENCE = 20


@contextmanager
def started(command, **options):
    """A job, with all that it starts. It is ended with the block, if it has not ended before."""
    # A group of its own: what a shell starts would go on without it.
    job = subprocess.Popen([str(it) for it in command], start_new_session=True, **options)
    try:
        yield job
    finally:
        end(job)


def end(job):
    """Ends a job. mpirun takes its processes with it, on this machine and on others, unless it is killed."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        # What the job left in its group ends, too.
        try:
            os.killpg(job.pid, number)
        except ProcessLookupError:
            return
        try:
            # Reads on: a job that writes into a full pipe does not end.
            job.communicate(timeout=PATIENCE)
        except (subprocess.TimeoutExpired, ValueError):
            pass  # It is killed now; or its pipes are closed.


def run(command, timeout=300):
    """The exit code, and all that was printed. A job that takes longer is ended."""
    with started(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as job:
        text, _ = job.communicate(timeout=timeout)
    print(f"+ {' '.join(str(it) for it in command)}\n{text}", flush=True)
    return job.returncode, text


def end_when_terminated():
    """Lets this program end its jobs when it is terminated itself."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
