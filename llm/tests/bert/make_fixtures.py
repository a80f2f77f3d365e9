"""Writes the reference outputs for the tests of the text classifier's encoder, with Hugging Face's
`transformers` and PEFT: a tiny BERT with random weights, sentence embeddings, and an adapter.

    python -m venv venv
    venv/bin/pip install torch==2.15.0 peft==0.21.2 transformers==5.24.0 safetensors==0.8.0
    venv/bin/python llm/tests/bert/make_fixtures.py MINILM

MINILM is a directory with all-MiniLM-L6-v2. The fixture does not contain its weights, only tokens,
their vectors and an adapter.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

FIXTURES = Path(__file__).parent / "fixtures"

SENTENCES = [
    "A thin green line divides the lake from the sky.",
    "it works",
    "Nobody expected the second act to be this funny!",
    "The train to Basel leaves at 7:42 from platform 11.",
    "Slow, dull and far too long.",
    "She said: \"I'd rather walk\" - and so we did.",
    "Rust's borrow checker rejects the program, which is what one wants.",
    "naïve café owners & their straße",
    "Low-rank matrices have few parameters.",
    "?",
    "What remains of a film when neither its actors nor its author nor its music are remembered, and "
    "nobody can say any longer where it was shown, who paid for it, or why the cat was there?",
    "good good good good bad",
    "3.14159 is not 22/7",
    "The quick brown fox jumps over the lazy dog, again.",
    "an unfamiliarwordthatnobodyeverwrote appears",
    "He never called back.",
]


def embed(model, ids, mask):
    """The mean of the vectors of each text's tokens."""
    hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
    kept = mask.unsqueeze(-1).float()
    return (hidden * kept).sum(1) / kept.sum(1)


def write(path, ids, mask, vectors, **more):
    numbers = [[round(it, 7) for it in row] for row in vectors.tolist()]
    content = {"ids": ids.tolist(), "mask": mask.tolist(), "vectors": numbers, **more}
    path.write_text(json.dumps(content, separators=(",", ":")) + "\n")


def minilm(directory):
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokens = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    model = AutoModel.from_pretrained(directory).eval()
    ids, mask = tokens.input_ids, tokens.attention_mask
    path = FIXTURES / "minilm"
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    with torch.no_grad():
        vectors = embed(model, ids, mask)
    write(path / "expected.json", ids, mask, vectors, sentences=SENTENCES)

    # Trains an adapter: each vector shall become its negative.
    config = LoraConfig(r=1, lora_alpha=3, target_modules=["query", "value"])
    adapted = get_peft_model(model, config)
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=0.002)
    for _ in range(12):
        optimizer.zero_grad()
        loss = (embed(adapted, ids, mask) - vectors.flip(1)).square().mean()
        loss.backward()
        optimizer.step()
    # Without the path on this machine.
    config.base_model_name_or_path = "sentence-transformers/all-MiniLM-L6-v2"
    adapted.save_pretrained(path / "adapter")
    (path / "adapter" / "README.md").unlink()
    with torch.no_grad():
        write(path / "adapter" / "expected.json", ids, mask, embed(adapted, ids, mask))
    print(f"minilm: {list(ids.shape)} tokens, loss {loss.item():.4f}")


def tiny():
    config = BertConfig(
        vocab_size=23, hidden_size=12, num_hidden_layers=2, num_attention_heads=3,
        intermediate_size=20, max_position_embeddings=9, type_vocab_size=2, layer_norm_eps=1e-12,
        hidden_act="gelu", attn_implementation="eager",
    )
    model = BertModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    path = FIXTURES / "tiny"
    shutil.rmtree(path, ignore_errors=True)
    model.eval().save_pretrained(path)
    mask = torch.tensor([[1] * length + [0] * (9 - length) for length in (9, 1, 4, 6)])
    ids = torch.randint(1, 23, mask.shape) * mask
    with torch.no_grad():
        write(path / "expected.json", ids, mask, embed(model, ids, mask))
        options = {"r": 3, "lora_alpha": 5, "init_lora_weights": False}
        config = LoraConfig(target_modules=["query", "value", "output.dense"], **options)
        adapted = get_peft_model(model, config).eval()
        # `get_peft_model` draws a B of another magnitude than that of a trained one.
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
        adapted.save_pretrained(path / "adapter")
        (path / "adapter" / "README.md").unlink()
        write(path / "adapter" / "expected.json", ids, mask, embed(adapted, ids, mask))
    print("tiny:", sum(file.stat().st_size for file in path.rglob("*") if file.is_file()), "bytes")


def main():
    torch.manual_seed(22)
    FIXTURES.mkdir(exist_ok=True)
    minilm(sys.argv[1])
    tiny()


if __name__ == "__main__":
    main()
