"""How the programs of PEFT are talked to."""

import os
import sys
import time

import torch

# What weights and inputs are.
DTYPE = {"f32": torch.float32, "bf16": torch.bfloat16}[os.environ.get("PRECISION", "f32")]


def serve(step):
    """Warms up, says `ready`, and then answers each line that comes, a number of steps, with the seconds of each."""
    for _ in range(int(os.environ.get("WARM_UP", 3))):
        step()
    print("ready", flush=True)
    for line in sys.stdin:
        times = []
        for _ in range(int(line)):
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
        print(*times, flush=True)
