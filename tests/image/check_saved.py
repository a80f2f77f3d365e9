"""Writes files of adapters with this crate, has diffusers read them, compares the outputs, and keeps the files, which
the tests then compare with what they write. Needs the environment of make_fixtures.py:

    venv/bin/python tests/image/check_saved.py
"""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file

from make_fixtures import FIXTURES, LAYERS, kohya_name, merged, read_by_diffusers, read_text_by_diffusers

ROOT = Path(__file__).parent.parent.parent


def by_formula(path):
    """What LyCORIS computes with a file in kohya's spelling that has magnitudes, which diffusers leaves out."""
    tensors = load_file(path)
    updates, magnitudes = {}, {}
    for name in LAYERS:
        flat = kohya_name(name)
        if f"{flat}.lora_up.weight" not in tensors:
            continue
        down, up = (tensors.pop(f"{flat}.lora_{part}.weight") for part in ["down", "up"])
        scale = tensors.pop(f"{flat}.alpha").item() / len(down)
        updates[name] = scale * (up.flatten(1) @ down.flatten(1))
        magnitude = tensors.pop(f"{flat}.dora_scale")
        assert magnitude.shape == (len(up), *[1] * (down.ndim - 1)), (name, magnitude.shape)
        magnitudes[name] = magnitude
    assert not tensors, tensors.keys()
    return merged(updates, magnitudes)


def main():
    expected = load_file(FIXTURES / "io.safetensors")
    source = {
        "saved_kohya": "kohya",
        "saved_kohya_dora": "kohya_dora",
        "saved_kohya_tucker": "kohya_tucker",
        "saved_diffusers": "kohya",
        "saved_diffusers_dora": "diffusers_dora",
        "saved_text_kohya": "kohya_text",
        "saved_text_diffusers": "kohya_text",
    }
    with tempfile.TemporaryDirectory() as out:
        subprocess.run(
            ["cargo", "test", "--quiet", "--package", "burn-lora", "--no-default-features", "--features", "flex",
             "--test", "suite", "--", "--ignored", "--exact", "image::saving::write_for_python"],
            cwd=ROOT, env={**os.environ, "IMAGE_OUT": out}, check=True, stdout=subprocess.DEVNULL,
        )
        assert {path.stem for path in Path(out).iterdir()} == source.keys()
        for path in sorted(Path(out).iterdir()):
            has_own_formula = path.stem == "saved_kohya_dora"
            read = read_text_by_diffusers if "text" in path.stem else read_by_diffusers
            y = by_formula(path) if has_own_formula else read(path)
            error = (y - expected[f"y.{source[path.stem]}"]).abs().max().item()
            with safe_open(path, "pt") as file:
                header = sorted(file.metadata())
            judge = "LyCORIS' formula" if has_own_formula else "diffusers"
            print(f"{path.stem:<22} largest difference from {judge} {error:.1e}, header {header}")
            assert error < 1e-5, path
            shutil.copyfile(path, FIXTURES / path.name)


if __name__ == "__main__":
    main()
