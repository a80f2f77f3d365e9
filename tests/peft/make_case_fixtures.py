"""Writes adapters of whole models as people have them: of models from `transformers`, with tables of
embeddings and modules trained in full in the file. Next to each is what every layer of the adapted
model computes by itself.

    venv/bin/python tests/peft/make_case_fixtures.py

The packages are those of make_fixtures.py.
"""

import math
import shutil
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

CASES = Path(__file__).parent / "fixtures" / "cases"


def llama(tied):
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=17, hidden_size=8, intermediate_size=12, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=16,
        tie_word_embeddings=tied,
    ))


def gpt2():
    return GPT2LMHeadModel(GPT2Config(
        vocab_size=13, n_positions=9, n_embd=8, n_layer=2, n_head=2, tie_word_embeddings=False,
    ))


class Mixed(torch.nn.Module):
    """Layers and norms, most of which have a bias."""

    def __init__(self):
        super().__init__()
        self.l = torch.nn.Linear(4, 5)
        self.nb = torch.nn.Linear(4, 5, bias=False)
        self.c = torch.nn.Conv2d(3, 4, (3, 2))
        self.norm = torch.nn.LayerNorm(5)
        self.final_norm = torch.nn.LayerNorm(5)
        self.bn = torch.nn.BatchNorm2d(4)
        self.gn = torch.nn.GroupNorm(2, 4)
        self.other = torch.nn.Linear(3, 3)


class Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = torch.nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = torch.nn.Linear(8, 3)


BASES = {
    "llama": lambda: llama(False),
    "llama_tied": lambda: llama(True),
    "gpt2": gpt2,
    "mixed": Mixed,
}


def base_model(name):
    """The model whose parameters are in `base_<name>.safetensors`."""
    model = BASES[name]().eval()
    tensors = load_file(CASES / f"base_{name}.safetensors")
    for path, module in model.named_modules():
        if isinstance(module, Conv1D):
            tensors[f"{path}.weight"] = tensors[f"{path}.weight"].T.contiguous()
    result = model.load_state_dict(tensors, strict=False)
    assert not result.unexpected_keys and set(result.missing_keys) <= {"lm_head.weight"}
    return model


def save_base(name):
    """Saves a new base. A `Conv1D` is saved as a `Linear` is. A tied head is not saved."""
    model = BASES[name]()
    tensors = {}
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
            tensors[path] = parameter.clone()
        for path, buffer in model.named_buffers():
            if path.endswith(("running_mean", "running_var")):
                buffer.copy_(0.5 + torch.rand_like(buffer))
                tensors[path] = buffer.clone()
        for path, module in model.named_modules():
            if isinstance(module, Conv1D):
                tensors[f"{path}.weight"] = module.weight.T.contiguous()
    save_file(tensors, CASES / f"base_{name}.safetensors")


def leaves(model):
    """The layers that hold parameters themselves."""
    for path, module in model.named_modules():
        if list(module.parameters(recurse=False)):
            yield path, module


def example(module):
    """An input of the layer."""
    if isinstance(module, torch.nn.Embedding):
        return torch.randint(0, module.num_embeddings, (2, 3))
    if isinstance(module, torch.nn.Linear):
        return torch.randn(5, module.in_features)
    if isinstance(module, Conv1D):
        return torch.randn(5, module.nx)
    if isinstance(module, torch.nn.Conv2d):
        return torch.randn(2, module.in_channels, 5, 4)
    if isinstance(module, (torch.nn.BatchNorm2d, torch.nn.GroupNorm)):
        return torch.randn(2, module.weight.shape[0], 3, 2)
    return torch.randn(5, module.weight.shape[0])


def randomize(model, also):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or also(name):
                parameter.copy_(0.5 * torch.randn_like(parameter))


def outputs(model, inputs):
    return {path: model.get_submodule(path)(x).contiguous() for path, x in inputs.items()}


def case(name, base, also=lambda name: False, save={}, **options):
    path = CASES / name
    shutil.rmtree(path, ignore_errors=True)
    original = base_model(base)
    inputs = {leaf: example(module) for leaf, module in leaves(original)}
    config = LoraConfig(**{"r": 3, "lora_alpha": 5, "init_lora_weights": False, **options})
    model = get_peft_model(original, config)
    randomize(model, also)
    model.eval()
    with torch.no_grad():
        results = outputs(model.base_model.model, inputs)
    assert all(math.isfinite(it.abs().sum()) for it in results.values())
    model.save_pretrained(path, **save)
    (path / "README.md").unlink()
    tensors = {f"x.{it}": x.float() for it, x in inputs.items()}
    tensors |= {f"y.{it}": y for it, y in results.items()}
    save_file(tensors, path / "io.safetensors")
    print(f"{name}: {sorted(load_file(path / 'adapter_model.safetensors'))}")


def attention():
    """An adapter that PEFT applies twice in part, which is refused."""
    path = CASES / "attention"
    model = get_peft_model(Attention(), LoraConfig(r=2, target_modules=["attn"]))
    model.save_pretrained(path)
    (path / "README.md").unlink()


def main():
    torch.manual_seed(22)
    shutil.rmtree(CASES, ignore_errors=True)
    CASES.mkdir()
    for name in BASES:
        save_base(name)

    case("gpt2_saved", "gpt2", also=lambda it: "modules_to_save" in it, fan_in_fan_out=True,
         target_modules=["c_attn"], modules_to_save=["c_fc", "lm_head"])
    case("gpt2_saved_square", "gpt2", also=lambda it: "modules_to_save" in it, fan_in_fan_out=True,
         target_modules=["c_attn"], modules_to_save=["attn.c_proj"])
    causal = {"task_type": "CAUSAL_LM"}
    case("llama_norm_saved", "llama", also=lambda it: "modules_to_save" in it, **causal,
         target_modules=["q_proj"], modules_to_save=["norm"])
    case("llama_head_targeted", "llama", **causal, target_modules=["q_proj", "lm_head"])
    case("llama_embedding_and_head", "llama", **causal,
         target_modules=["embed_tokens", "lm_head"])
    case("llama_tables_saved", "llama",
         also=lambda it: it.endswith(("embed_tokens.weight", "lm_head.weight")),
         **causal, target_modules=["q_proj"], save={"save_embedding_layers": True})
    case("tied_embedding", "llama_tied", **causal, target_modules=["q_proj", "embed_tokens"])
    case("tied_embedding_ensured", "llama_tied", **causal, ensure_weight_tying=True,
         target_modules=["q_proj", "embed_tokens"])
    case("tied_tables_saved", "llama_tied", also=lambda it: it.endswith("embed_tokens.weight"),
         **causal, target_modules=["q_proj"], save={"save_embedding_layers": True})
    case("bias_all_saved", "mixed", also=lambda it: it.endswith("bias") or "modules_to_save" in it,
         target_modules=["l", "c"], modules_to_save=["other", "final_norm"], bias="all")
    case("batch_norm_saved", "mixed", also=lambda it: "modules_to_save" in it,
         target_modules=["l"], modules_to_save=["bn"])
    attention()


if __name__ == "__main__":
    main()
