"""Times batches in which each sample uses a set of adapters of its own, beside batches with one set: burn-lora's
bench, and then PEFT on PyTorch. Prints a table of each in Markdown.

    python -m venv env && env/bin/pip install torch==2.15.0 peft==0.21.2
    env/bin/python compare_mixed.py
"""

import statistics
import subprocess
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model

DEPTH, ROUNDS, SECONDS = 4, 7, 0.3
SIZES = [(32, 1, 2048, 16), (32, 1, 576, 8), (32, 64, 576, 8), (16, 128, 2048, 16)]

bench = ["cargo", "bench", "--bench", "suite", "--no-default-features", "--features", "flex", "--", "mixed"]
subprocess.run(bench, check=True, cwd=Path(__file__).parents[2])


def layers(width):
    return torch.nn.Sequential(*[torch.nn.Linear(width, width) for _ in range(DEPTH)])


def adapted(samples, width, rank):
    config = LoraConfig(r=rank, lora_alpha=16, target_modules=["0", "1", "2", "3"], init_lora_weights=False)
    model = get_peft_model(layers(width), config, adapter_name="0")
    for sample in range(1, samples):
        model.add_adapter(str(sample), config)
    return model.eval()


def medians(works):
    """The medians of the seconds that each takes, timed in turn."""
    times = [[] for _ in works]
    for turn in range(ROUNDS + 1):
        for work, seconds in zip(works, times):
            start, runs = time.perf_counter(), 0
            while runs == 0 or time.perf_counter() - start < SECONDS:
                work()
                runs += 1
            if turn > 0:
                seconds.append((time.perf_counter() - start) / runs)
    return [statistics.median(seconds) for seconds in times]


print(f"### The same in PEFT, with {torch.get_num_threads()} threads\n")
print("| samples, tokens, width | rank | base, ms | one set / base | sets / one set |")
print("|---|---:|---:|---:|---:|")
with torch.inference_mode():
    for samples, tokens, width, rank in SIZES:
        plain, model = layers(width).eval(), adapted(samples, width, rank)
        x = torch.rand(samples, tokens, width)
        names = [str(sample) for sample in range(samples)]

        def base():
            plain(x)

        def one():
            model(x)

        def several():
            model(x, adapter_names=names)

        alone, one, several = medians([base, one, several])
        print(f"| {samples}, {tokens}, {width} | {rank} | {1000 * alone:.2f} | {one / alone:.2f} "
              f"| {several / one:.2f} |")
