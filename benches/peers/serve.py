"""How the programs of PEFT are talked to."""

import sys
import time


def serve(step):
    """Says `ready`, and then answers each line that comes, a number of steps, with the seconds of each."""
    for _ in range(3):
        step()
    print("ready", flush=True)
    for line in sys.stdin:
        times = []
        for _ in range(int(line)):
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
        print(*times, flush=True)
