"""Measures the memory that trainings in segments take: of SmolLM2-135M on its own Q4_1 file, of a model of 1.07 billion
parameters in NF4, and of a file of Llama 3.1 8B's shapes in Q4_K_M, which is killed and resumed. Prints a table in
Markdown. Times are not measured. The large models are those that `write_large.py` writes.

    cargo build --release --bin burn-lora
    env/bin/python measure_memory.py target/release/burn-lora SMOLLM2.gguf LLAMA-1B LLAMA-8B.gguf

Only what is given is measured.
"""

import sys
import tempfile
import time
from pathlib import Path

from compare_bases import measured, write_texts

SEGMENTS = ["--segments", "--workers=1"]


def row(name, peaks):
    own, whole = peaks
    print(f"| {name} | {own:.0f} MiB | {whole:.0f} MiB | {whole * 1.048576:.0f} MB |", flush=True)


def train(program, model, data, out, *settings):
    return [program, "train", f"--model={model}", f"--data={data}", f"--out={out}", *SEGMENTS, *settings]


def main():
    program, models = sys.argv[1], sys.argv[2:]
    print("| training in segments, one worker | memory of its own | in all | |")
    print("|---|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as out:
        data, runs = Path(out, "data"), Path(out, "run")
        data.mkdir()
        write_texts(data)
        four = ["--batch=4", "--max-length=128", "--warmup=1", "--eval-every=1000", "--force"]
        for name, model, settings in zip(
            ["SmolLM2-135M in Q4_1, 4 x 128 tokens", "1.07 billion parameters in NF4, 4 x 128 tokens"],
            models, [["--iters=20"], ["--iters=3", "--quantize=nf4"]],
        ):
            _, *peaks = measured(train(program, model, data, runs, *four, *settings))
            row(name, peaks)
        if len(models) < 3:
            return
        write_texts(data, size=4000, count=10)
        # To evaluate takes no more memory than a step, and long.
        (data / "valid.jsonl").write_text('{"text": "A short text."}\n')
        one = ["--batch=1", "--max-length=512", "--rank=16", "--alpha=32", "--iters=2", "--warmup=1", "--eval-every=1"]
        first, since = runs / "checkpoints" / "1", None

        def in_second_step():
            nonlocal since
            if since is None and first.exists():
                since = time.monotonic()
            return since is not None and time.monotonic() > since + 30

        name, command = "8.03 billion in Q4_K_M, 1 x 512 tokens, rank 16", train(program, models[2], data, runs, *one)
        _, *peaks = measured([*command, "--force"], in_second_step)
        row(name, peaks)
        _, *peaks = measured([*command, "--resume"])
        row("the same, killed and resumed", peaks)


if __name__ == "__main__":
    main()
