"""Answers a prompt in Python with what the program `burn-lora` saved: with the adapters in PEFT, and with
the merged model in Hugging Face's `transformers`. Needs the environment of make_fixtures.py:

    cargo install --path llm
    burn-lora train --model MODEL --data DATA
    burn-lora merge --model MODEL --adapter out/language_model/adapter --out merged
    burn-lora generate --model MODEL --adapter out/language_model/adapter --prompt PROMPT
    venv/bin/python llm/tests/llama/check_saved.py MODEL out/language_model/adapter merged PROMPT

Both must print what the last command of the program printed. The scores of the two are compared.
"""

import sys

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer


def main():
    base, adapter, merged, prompt = sys.argv[1:]
    tokenizer = AutoTokenizer.from_pretrained(merged)
    message = [{"role": "user", "content": prompt}]
    inputs = tokenizer.apply_chat_template(
        message, add_generation_prompt=True, return_tensors="pt", return_dict=True,
    )
    length = inputs["input_ids"].shape[1]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    scores = []
    for name, model in [
        ("PEFT", PeftModel.from_pretrained(model, adapter)),
        ("merged", AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)),
    ]:
        model.eval()
        with torch.no_grad():
            scores.append(model(**inputs).logits[0, -1])
            ids = model.generate(**inputs, max_new_tokens=200, do_sample=False)
        print(f"{name}: {tokenizer.decode(ids[0, length:], skip_special_tokens=True)}")
    error = ((scores[0] - scores[1]).abs().max() / scores[0].abs().max()).item()
    print(f"largest difference of the scores: {error:.1e} of the largest")
    assert error < 1e-4


if __name__ == "__main__":
    main()
