"""Asks llama.cpp itself: what it says of models and of adapters that burn-lora wrote.

Makes a tiny decoder with random weights of each of six families, with tokens and an adapter of PEFT's, in
`fixtures/llamacpp`. Has the program write each as a GGUF file in single precision, its adapter as a file of llama.cpp's,
and the model with the adapter merged into it. Then notes the log-probabilities of all next tokens that llama.cpp computes
with these files after 20 texts, and compares them with those of `transformers` and PEFT. If the path of llama.cpp's own
converter of adapters is given (`convert_lora_to_gguf.py`, with the folder `conversion` beside it), what that makes of the
adapter becomes a fixture, too.

    python -m venv venv
    venv/bin/pip install torch==2.15.0 peft==0.21.2 transformers==5.24.0 safetensors==0.8.0 gguf==0.19.0 xllamacpp==2026.10.11549
    cargo build --bin burn-lora
    venv/bin/python llm/tests/gguf/make_llamacpp.py target/debug/burn-lora [CONVERTER]
"""

import json
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

import torch
import xllamacpp
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM,
    Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM, SmolLM3Config, SmolLM3ForCausalLM,
)

FIXTURES = Path(__file__).parent / "fixtures" / "llamacpp"
PROGRAM, *CONVERTER = sys.argv[1:]

PIECES = ["Ġ", "Ċ", *"abcdefghijklmnopqrstuvwxyz", "th", "the", "Ġthe", "an", "Ġa"]
# llama.cpp expects all of these in Phi-3.
SPECIAL = ["<s>", "<|endoftext|>", "<unk>", "</s>"]
COUNT = len(PIECES) + len(SPECIAL)

SIZES = {
    "vocab_size": COUNT, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "attn_implementation": "eager",
    "bos_token_id": len(PIECES), "eos_token_id": len(PIECES) + 1, "pad_token_id": None,
}
PLAIN = {"rope_type": "default", "rope_theta": 100.0}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 50.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES, tie_word_embeddings=False, rope_parameters=LLAMA3)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SIZES, tie_word_embeddings=False, rope_parameters=PLAIN)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SIZES, head_dim=8, tie_word_embeddings=True, rope_parameters=PLAIN)),
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig(
        **SIZES | {"num_hidden_layers": 7, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1},
        head_dim=8, query_pre_attn_scalar=8, sliding_window=4, rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 80.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
        },
    )),
    # llama.cpp passes over the window, which is as long as the longest text here.
    "phi3": (Phi3ForCausalLM, Phi3Config(**SIZES, tie_word_embeddings=False, original_max_position_embeddings=64,
                                         sliding_window=12, rope_parameters=PLAIN)),
    "smollm3": (SmolLM3ForCausalLM, SmolLM3Config(
        **SIZES | {"num_hidden_layers": 4, "hidden_size": 8, "intermediate_size": 12}, no_rope_layer_interval=4,
        tie_word_embeddings=True, rope_parameters=PLAIN,
    )),
}


def tokenizer():
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("a", "n"), ("Ġ", "a")]
    found = Tokenizer(models.BPE({piece: id for id, piece in enumerate(PIECES)}, merges))
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    found.add_special_tokens([AddedToken(it, special=True) for it in SPECIAL])
    return found


def make(name, kind, config, path):
    model = kind(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            # Near one in norms, where Gemma adds 1 itself.
            scale, mean = (0.2, 0.0 if name == "gemma3" else 1.0) if key.endswith("norm.weight") else (0.4, 0.0)
            parameter.copy_(mean + scale * torch.randn_like(parameter))
            if name == "gemma3" and "post_feedforward_layernorm" in key:
                # llama.cpp takes GELU from a table of numbers in half precision. What comes of it is small here.
                parameter.copy_(-0.98 + 0.01 * torch.randn_like(parameter))
    model.save_pretrained(path)
    (path / "generation_config.json").unlink(missing_ok=True)
    tokenizer().save(str(path / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings) + "\n")
    lora = LoraConfig(r=2, lora_alpha=3, use_rslora=name == "qwen2", target_modules="all-linear", init_lora_weights=False,
                      task_type="CAUSAL_LM")
    adapted = get_peft_model(model, lora)
    with torch.no_grad():
        for key, parameter in adapted.named_parameters():
            if "lora_" in key:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    adapted.save_pretrained(path / "adapter")
    (path / "adapter" / "README.md").unlink()


def post(url, body):
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    return json.load(urllib.request.urlopen(request))


def of_llama_cpp(model, adapter, prompts):
    """The log-probabilities of all tokens after each text, in single precision."""
    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.n_ctx, params.n_parallel, params.warmup = 64, 1, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if adapter:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    server = xllamacpp.Server(params)
    rows = []
    for ids in prompts:
        body = {"prompt": ids, "n_predict": 1, "n_probs": COUNT, "temperature": -1, "cache_prompt": False}
        answer = post(server.listening_address + "/completion", body)
        found = {it["id"]: it["logprob"] for it in answer["completion_probabilities"][0]["top_logprobs"]}
        rows.append([round(found[id], 6) for id in range(COUNT)])
    return rows


def of_torch(model, prompts):
    with torch.no_grad():
        return [model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1).tolist() for ids in prompts]


def furthest(one, other):
    return max(abs(a - b) for row, others in zip(one, other) for a, b in zip(row, others))


def burn_lora(*arguments):
    subprocess.run([PROGRAM, *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)


torch.manual_seed(11)
prompts = [torch.randint(0, COUNT, (1 + it % 12,)).tolist() for it in range(20)]
for name, (kind, config) in FAMILIES.items():
    path = FIXTURES / name
    shutil.rmtree(path, ignore_errors=True)
    make(name, kind, config, path)
    adapter = path / "adapter"
    with tempfile.TemporaryDirectory() as dir:
        base, adapters, merged = [Path(dir) / it / "x.gguf" for it in ["base", "adapters", "merged"]]
        burn_lora("merge", "--model", path, "--type", "f32", "--out", base)
        burn_lora("export", "--model", path, "--adapter", adapter, "--out", adapters)
        burn_lora("merge", "--model", path, "--adapter", adapter, "--type", "f32", "--out", merged)
        expected = {
            "ids": prompts,
            "base": of_llama_cpp(base, None, prompts),
            "adapted": of_llama_cpp(base, adapters, prompts),
            "merged": of_llama_cpp(merged, None, prompts),
        }
        shutil.copyfile(base, path / "base.gguf")
        if CONVERTER:
            # Its scale is wrong with rsLoRA.
            command = [sys.executable, CONVERTER[0], "--base", path, adapter, "--outfile", path / "converted.gguf", "--outtype", "f32"]
            subprocess.run(list(map(str, command)), check=True, capture_output=True)
    (path / "expected.json").write_text(json.dumps(expected, separators=(",", ":")) + "\n")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    plain = of_torch(model, prompts)
    adapted = of_torch(PeftModel.from_pretrained(model, adapter).eval(), prompts)
    print(f"{name}: base {furthest(plain, expected['base']):.1e}, adapted {furthest(adapted, expected['adapted']):.1e}, "
          f"merged {furthest(adapted, expected['merged']):.1e}; the adapter changes up to {furthest(plain, adapted):.1f}")
