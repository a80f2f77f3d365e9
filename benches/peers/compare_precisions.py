"""Times training steps in f32 and in bf16 in turn, side by side: burn-lora and PEFT on PyTorch, each in both precisions.
Prints tables in Markdown: products, layers, whole models, and language models of two sizes with long texts, from files
in bf16 and with bases of 4 and 8 bits.

    python -m venv env && env/bin/pip install torch==2.15.0 peft==0.21.2 transformers==5.24.0
    cargo build --release --bin burn_lora --bin whole_model --bin long_text --no-default-features --features flex
    env/bin/python compare_precisions.py target/release [products|layers|models|texts|large|bases ...]

In bf16, PEFT's weights are bf16 and its adapters f32, which is its default for checkpoints in bf16. burn-lora multiplies
in bf16 by `Precision::Bf16`, and holds the weights of a file in bf16 as they are.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

chosen = sys.argv[2:]
del sys.argv[2:]

from compare import THREADS, Peer, binaries  # it reads the command line
from compare_models import peak

KEEPS = {"MIMALLOC_PURGE_DELAY": "-1"}
HERE = Path(__file__).parent
PRECISIONS = ["f32", "bf16"]


def python(name, *arguments):
    return [sys.executable, str(HERE / name), *arguments]


def both(own, peer, own_in=PRECISIONS):
    """burn-lora and PEFT in both precisions."""
    ways = {f"burn-lora, {it}": (own, {**KEEPS, "PRECISION": it}) for it in own_in}
    return ways | {f"PEFT, {it}": (peer, {"PRECISION": it}) for it in PRECISIONS}


def in_turn(ways, rounds, steps, warm_up=1):
    """The median seconds of a step and the peak in MiB, by program. All run at once, and have their turns."""
    running = {name: Peer(*how, ()) for name, how in ways.items()}
    times = {name: [] for name in running}
    for _ in range(rounds):
        for name, peer in running.items():
            times[name] += peer.steps(warm_up + steps)[warm_up:]
            time.sleep(0.05)
    peaks = {name: peak(peer.process) for name, peer in running.items()}
    for peer in running.values():
        peer.stop()
    return {name: (statistics.median(values), peaks[name]) for name, values in times.items()}


def anew(ways, rounds, steps):
    """The seconds of the fastest step, and the peak of the steps in MiB. Each program is started anew for its turn, since
    all would not fit into memory together."""
    times, peaks = {name: [] for name in ways}, {name: 0 for name in ways}
    for _ in range(rounds):
        for name, (command, variables) in ways.items():
            peer = Peer(command, {**variables, "WARM_UP": "1"}, ())
            # From here on the peak counts anew, without what reading the model took.
            Path(f"/proc/{peer.process.pid}/clear_refs").write_text("5")
            times[name] += peer.steps(steps)
            peaks[name] = max(peaks[name], peak(peer.process))
            peer.stop()
    return {name: (min(times[name]), peaks[name]) for name in ways}


def table(title, unit):
    print(f"\n### {title}\n\n| | program | {unit} | of PEFT's in the same precision | of PEFT's in bf16 | peak, MiB |")
    print("|---|---|---:|---:|---:|---:|")


def rows(case, found, value, digits=3):
    """`value` makes what is printed of seconds; ratios are of it."""
    values = {name: value(seconds) for name, (seconds, _) in found.items()}
    for name, (_, most) in found.items():
        same = values["PEFT, f32" if "f32" in name else "PEFT, bf16"]
        ratios = f"{values[name] / same:.2f} | {values[name] / values['PEFT, bf16']:.2f}"
        print(f"| {case} | {name} | {values[name]:.{digits}f} | {ratios} | {most:.0f} |", flush=True)


def products():
    table("Products of a linear layer, rows x inner x columns", "billions of operations a second")
    for size in ["1024x1024x1024", "512x576x1536", "512x1536x576"]:
        own, peer = [str(binaries / "whole_model"), "product", size, "1", "plain"], python("peft_model.py", "product", size)
        a, b, c = map(int, size.split("x"))
        rows(size, in_turn(both(own, peer), 7, 30, 5), lambda seconds: 2e-9 * a * b * c / seconds, 0)


def layers():
    table("Training step of a linear layer: tokens, width, rank", "ms")
    for shape in [(256, 1024, 8), (512, 4096, 8), (2048, 1024, 16)]:
        shape = list(map(str, shape))
        ways = both([str(binaries / "burn_lora"), "lora", *shape], python("peft_step.py", "lora", *shape))
        rows(", ".join(shape), in_turn(ways, 9, 5, 2), lambda seconds: 1e3 * seconds, 2)


def models():
    table("Training step of a model", "s")
    for model, method, steps in [("minilm", "lora", 5), ("smollm2", "lora", 2), ("resnet", "lora", 4),
                                 ("conv", "lora", 15)]:
        own = [str(binaries / "whole_model"), model, method, THREADS, "plain"]
        rows(f"{model}, {method}", in_turn(both(own, python("peft_model.py", model, method)), 5, steps),
             lambda seconds: seconds)


def write_model(directory, large):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = dict(vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22,
                 num_attention_heads=32, num_key_value_heads=4) if large else dict(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True)
    config = LlamaConfig(rms_norm_eps=1e-5, max_position_embeddings=8192, **sizes)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)


def text_ways(directory, texts, length, precisions=PRECISIONS, quantize=()):
    size = [str(directory), str(length), str(texts)]
    workers = THREADS if texts > 1 else "1"
    ways = {}
    for way, peer_way, name in [("plain", "plain", ""), ("segments", "checkpointing", ", segments")]:
        own = [str(binaries / "long_text"), *size, workers, way, *quantize]
        for it in precisions:
            ways[f"burn-lora, {it}{name}"] = (own, {**KEEPS, "PRECISION": it})
        for it in precisions:
            ways[f"PEFT, {it}{', checkpointing' if name else ''}"] = (python("peft_long.py", *size, peer_way),
                                                                    {"PRECISION": it})
    return ways


def texts():
    table("SmolLM2-135M, texts x tokens, from a file in bf16", "tokens/s")
    with tempfile.TemporaryDirectory() as directory:
        write_model(directory, False)
        for texts, length, precisions, rounds in [(4, 128, PRECISIONS, 2), (1, 1024, PRECISIONS, 2), (1, 4096, ["bf16"], 1)]:
            found = anew(text_ways(directory, texts, length, precisions), rounds, 2 if texts * length <= 1024 else 1)
            rows(f"{texts} x {length}", found, lambda seconds: texts * length / seconds, 0)


def large():
    table("A decoder of 1.1 billion parameters, 4 x 128 tokens, from a file in bf16", "tokens/s")
    with tempfile.TemporaryDirectory() as directory:
        write_model(directory, True)
        ways = text_ways(directory, 4, 128, ["bf16"])
        for kind in ["int8", "nf4"]:
            own = [str(binaries / "long_text"), directory, "128", "4", THREADS, "segments", kind]
            ways[f"burn-lora, bf16, segments, {kind}"] = (own, {**KEEPS, "PRECISION": "bf16"})
        rows("4 x 128", anew(ways, 1, 2), lambda seconds: 4 * 128 / seconds, 0)


def bases():
    table("SmolLM2-135M, 4 x 128 tokens, by what the linear layers are held in", "s")
    with tempfile.TemporaryDirectory() as directory:
        write_model(directory, False)
        ways = {}
        for kind in [(), ("int8",), ("nf4",)]:
            own = [str(binaries / "long_text"), directory, "128", "4", THREADS, "plain", *kind]
            for it in PRECISIONS:
                ways[f"burn-lora, {it}, {kind[0] if kind else 'the file'}"] = (own, {**KEEPS, "PRECISION": it})
        for it in PRECISIONS:
            ways[f"PEFT, {it}"] = (python("peft_long.py", directory, "128", "4", "plain"), {"PRECISION": it})
        rows("4 x 128", anew(ways, 2, 3), lambda seconds: seconds)


if __name__ == "__main__":
    parts = [products, layers, models, texts, large, bases]
    for part in parts:
        if not chosen or part.__name__ in chosen:
            part()
    print(f"\n{THREADS} threads, in turn. The peak of language models is that of the steps.")
