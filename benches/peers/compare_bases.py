"""Trains adapters of SmolLM2-135M on bases in full, in 8 and 4 bits and as a GGUF file, with burn-lora, and in full
with PEFT on PyTorch, one after the other, on this repository's documentation. Prints a table in Markdown.

    python -m venv env && env/bin/pip install torch==2.15.0 peft==0.21.2 transformers==5.24.0 gguf==0.19.0
    cargo build --release --bin burn-lora
    env/bin/python compare_bases.py target/release/burn-lora SmolLM2-135M-Instruct.Q4_1.gguf
"""

import json
import math
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

STEPS, BATCH, LENGTH, RATE, RANK, ALPHA = 20, 4, 128, 2e-4, 8, 16
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ROOT = Path(__file__).parents[2]


def write_texts(data, size=800, count=None):
    """Pieces of the documentation, of so many characters; every eighth is for the evaluation."""
    files = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    text = "\n".join(file.read_text() for file in files)
    pieces = [text[start:start + size] for start in range(0, len(text), size)][:count]
    sets = {"train": [], "valid": []}
    for index, piece in enumerate(pieces):
        sets["valid" if index % 8 == 0 else "train"].append(json.dumps({"text": piece}))
    for name, lines in sets.items():
        (data / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


def write_dense(gguf, to):
    """What the file stands for, in full, as a directory."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype="float32")
    model.config.quantization_config = None
    del model.config.quantization_config
    model.config.save_pretrained(to)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(to)
    weights = {name: it.contiguous() for name, it in model.state_dict().items() if name != "lm_head.weight"}
    save_file(weights, to / "model.safetensors", metadata={"format": "pt"})


def train_peft(dense, data):
    """Prints the perplexities, and the tokens per second."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    tokens = AutoTokenizer.from_pretrained(dense)
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=LAYERS))

    def read(name):
        lines = (data / f"{name}.jsonl").read_text().splitlines()
        texts = [json.loads(line)["text"] for line in lines]
        return [tokens(text)["input_ids"][:LENGTH] for text in texts]

    def loss(texts):
        """The sum over all tokens but the first of each text, and their number."""
        length = max(map(len, texts))
        ids = torch.zeros(len(texts), length, dtype=torch.long)
        labels = torch.full_like(ids, -100)
        for row, text in enumerate(texts):
            ids[row, :len(text)] = labels[row, :len(text)] = torch.tensor(text)
        logits = model(input_ids=ids).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
        return losses, (labels[:, 1:] >= 0).sum().item()

    def perplexity():
        with torch.inference_mode():
            parts = [loss([text]) for text in valid]
        return math.exp(sum(part.item() for part, _ in parts) / sum(count for _, count in parts))

    train, valid = read("train"), read("valid")
    before, order = perplexity(), torch.randperm(len(train)).tolist() * STEPS
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    start, count = time.perf_counter(), 0
    for step in range(STEPS):
        texts = [train[index] for index in order[step * BATCH:][:BATCH]]
        total, targets = loss(texts)
        (total / targets).backward()
        optimizer.step()
        optimizer.zero_grad()
        count += sum(map(len, texts))
    speed = count / (time.perf_counter() - start)
    print(json.dumps({"perplexity_before": before, "perplexity_after": perplexity(), "tokens_per_second": speed}))


def measured(command, ends=lambda: False):
    """Runs the command, and returns what it writes and the most memory of its own, and in all, that it has, in MiB. It is
    killed when `ends` says so."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    peaks, killed = {"RssAnon": 0, "VmHWM": 0}, False

    def watch():
        nonlocal killed
        while process.poll() is None:
            if ends():
                killed = True
                process.kill()
            try:
                lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            except OSError:
                return
            for name, value in (line.split(":", 1) for line in lines):
                if name in peaks:
                    peaks[name] = max(peaks[name], int(value.split()[0]) / 1024)
            time.sleep(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    output = process.communicate()[0]
    watcher.join()
    assert killed or process.returncode == 0, (command, output)
    return output, peaks["RssAnon"], peaks["VmHWM"]


def main():
    program, gguf = sys.argv[1], Path(sys.argv[2]).absolute()
    with tempfile.TemporaryDirectory() as out:
        data, dense, runs = Path(out, "data"), Path(out, "dense"), Path(out, "run")
        data.mkdir(), dense.mkdir()
        write_texts(data)
        write_dense(gguf, dense)
        print("| base | memory of its own | in all | perplexity before | after | tokens per second |")
        print("|---|---:|---:|---:|---:|---:|")

        def row(name, result, own, whole):
            print(f"| {name} | {own:.0f} MiB | {whole:.0f} MiB | {result['perplexity_before']:.2f} "
                  f"| {result['perplexity_after']:.2f} | {result['tokens_per_second']:.0f} |", flush=True)

        settings = [f"--iters={STEPS}", f"--batch={BATCH}", f"--max-length={LENGTH}", f"--learning-rate={RATE}",
                    f"--rank={RANK}", f"--alpha={ALPHA}", "--warmup=1", "--eval-every=1000"]
        for name, model in [
            ("in full", [f"--model={dense}"]),
            ("int8", [f"--model={dense}", "--quantize=int8"]),
            ("NF4", [f"--model={dense}", "--quantize=nf4"]),
            ("GGUF, Q4_1", [f"--model={gguf}"]),
        ]:
            for how, more in [("", []), (", in segments, one worker", ["--segments", "--workers=1"])]:
                command = [program, "train", *model, f"--data={data}", f"--out={runs}", *settings, *more]
                _, own, whole = measured(command)
                row(name + how, json.loads((runs / "summary.json").read_text()), own, whole)
        peft = [sys.executable, __file__, "peft", str(dense), str(data)]
        output, own, whole = measured(peft)
        row("in full, PEFT", json.loads(output.splitlines()[-1]), own, whole)


if __name__ == "__main__":
    if sys.argv[1] == "peft":
        train_peft(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        main()
