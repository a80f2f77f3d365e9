"""Writes a small U-Net, adapters for it in the spellings of image models, and the outputs of each.

    python -m venv venv
    venv/bin/pip install torch==2.15.0 peft==0.21.2 transformers==5.24.0 diffusers==0.42.1 safetensors==0.8.0
    venv/bin/python tests/image/make_fixtures.py

The outputs are those of diffusers, with the file loaded by diffusers. What it does not read (DoRA and Tucker in kohya's
spelling, alphas beside `diffusion_model.`) is added to the weights by the formula of the program that writes it, which
is compared with diffusers on the files that both read.
"""

from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

FIXTURES = Path(__file__).parent / "fixtures"
BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
MIDDLE = "mid_block.attentions.0.transformer_blocks.0"
# The rank and the alpha of each layer. diffusers 0.42 reads the alphas of attention layers in kohya's files only if
# they are the most frequent of the file, and so they are equal here.
LINEAR = {
    "time_embedding.linear_1": (2, 5.0),
    f"{BLOCK}.attn1.to_q": (2, 3.0),
    f"{BLOCK}.attn2.to_k": (2, 3.0),
    f"{BLOCK}.attn2.to_out.0": (2, 3.0),
    f"{MIDDLE}.attn1.to_v": (2, 3.0),
    f"{BLOCK}.ff.net.0.proj": (2, 0.5),
    f"{MIDDLE}.ff.net.2": (2, 3.0),
    "up_blocks.1.resnets.0.time_emb_proj": (2, 3.0),
}
CONV = {
    "down_blocks.0.attentions.0.proj_in": (3, 1.5),
    "down_blocks.0.resnets.0.conv1": (3, 1.5),
    "down_blocks.0.downsamplers.0.conv": (3, 2.0),
    "up_blocks.0.resnets.1.conv_shortcut": (3, 1.5),
}
LAYERS = {**LINEAR, **CONV}
TEXT = {
    "encoder.layers.0.self_attn.q_proj": (2, 3.0),
    "encoder.layers.0.self_attn.out_proj": (2, 3.0),
    "encoder.layers.1.mlp.fc1": (2, 3.0),
    "encoder.layers.1.mlp.fc2": (2, 3.0),
}


def unet():
    model = UNet2DConditionModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(4, 8),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=6,
        attention_head_dim=2,
        norm_num_groups=2,
    )
    if (FIXTURES / "base.safetensors").exists():
        model.load_state_dict(load_file(FIXTURES / "base.safetensors"))
    return model.eval()


def text_encoder():
    model = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=20, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=7, hidden_act="quick_gelu", bos_token_id=0, eos_token_id=19, pad_token_id=19,
        )
    )
    if (FIXTURES / "base_text.safetensors").exists():
        model.load_state_dict(load_file(FIXTURES / "base_text.safetensors"))
    return model.eval()


def text_output(model):
    with torch.no_grad():
        return model(load_file(FIXTURES / "io.safetensors")["tokens"].long()).last_hidden_state


def read_text_by_diffusers(path):
    """The output of the text encoder with the file loaded as a pipeline loads it."""
    state, alphas, metadata = StableDiffusionPipeline.lora_state_dict(path, return_lora_metadata=True)
    model = text_encoder()
    StableDiffusionPipeline.load_lora_into_text_encoder(state, alphas, model, metadata=metadata)
    return text_output(model)


def inputs():
    io = load_file(FIXTURES / "io.safetensors")
    return io["x"], io["t"], io["context"]


def output(model):
    with torch.no_grad():
        return model(*inputs()).sample


def read_by_diffusers(path, prefix="unet"):
    """The output of the U-Net with the file loaded as a pipeline loads it."""
    state, alphas, metadata = StableDiffusionPipeline.lora_state_dict(path, return_lora_metadata=True)
    model = unet()
    model.load_lora_adapter(state, prefix=prefix, network_alphas=alphas, metadata=metadata)
    return output(model)


def merged(updates, magnitudes=None):
    """The output with updates of the weights, which have these norms for each output if there are magnitudes."""
    model = unet()
    for name, update in updates.items():
        weight = model.get_submodule(name).weight.data
        changed = weight.double() + update.double().reshape(weight.shape)
        if magnitudes:
            norm = changed.flatten(1).norm(dim=1)
            gain = magnitudes[name].flatten().double() / norm
            changed = changed * gain.reshape(-1, *[1] * (weight.ndim - 1))
        weight.copy_(changed)
    return output(model)


def factors(layers, model=unet):
    """A down and an up for each layer, as sd-scripts has them."""
    shapes = {name: parameter.shape for name, parameter in model().named_parameters()}
    drawn = {}
    for name, (rank, _) in layers.items():
        d_output, *rest = shapes[f"{name}.weight"]
        up = torch.randn(d_output, rank, *[1] * (len(rest) - 1))
        drawn[name] = (0.5 * torch.randn(rank, *rest), 0.5 * up)
    return drawn


def updates(layers, drawn):
    return {
        name: alpha / rank * (drawn[name][1].flatten(1) @ drawn[name][0].flatten(1))
        for name, (rank, alpha) in layers.items()
    }


def kohya_name(name, begin="lora_unet_"):
    return begin + name.replace(".", "_")


def kohya(layers, drawn, begin="lora_unet_"):
    tensors = {}
    for name, (_, alpha) in layers.items():
        down, up = drawn[name]
        flat = kohya_name(name, begin)
        tensors[f"{flat}.lora_down.weight"] = down
        tensors[f"{flat}.lora_up.weight"] = up
        tensors[f"{flat}.alpha"] = torch.tensor(alpha)
    return tensors


def attach(**options):
    """The U-Net with an adapter of PEFT on the layers, and random factors."""
    config = LoraConfig(
        r=2, lora_alpha=3,
        target_modules=list(LAYERS),
        rank_pattern={f"^{name}": rank for name, (rank, _) in CONV.items()},
        alpha_pattern={f"^{name}": alpha for name, (_, alpha) in LAYERS.items() if alpha != 3},
        init_lora_weights=False, **options,
    )
    model = unet()
    model.add_adapter(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude" in name:
                parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
            elif "lora_" in name:
                parameter.copy_(0.5 * torch.randn_like(parameter))
    return model.eval(), config


def main():
    torch.manual_seed(7)
    for path in FIXTURES.glob("*.safetensors"):
        path.unlink()
    base = unet()
    with torch.no_grad():
        for parameter in base.parameters():
            # Norms and biases must not be one and zero.
            parameter.add_(0.1 * torch.randn_like(parameter))
    save_file(base.state_dict(), FIXTURES / "base.safetensors")
    base_text = text_encoder()
    with torch.no_grad():
        for parameter in base_text.parameters():
            # Those of transformers are nearly zero.
            parameter.add_(0.3 * torch.randn_like(parameter))
    save_file(base_text.state_dict(), FIXTURES / "base_text.safetensors")
    io = {
        "x": torch.randn(2, 3, 8, 8), "t": torch.tensor([7.0, 430.0]), "context": torch.randn(2, 5, 6),
        "tokens": torch.randint(20, (2, 7)).float(),
    }
    save_file(io, FIXTURES / "io.safetensors")
    expected = {"base": output(base), "base_text": text_output(base_text)}

    def save(name, tensors, y, metadata=None):
        tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
        save_file(tensors, FIXTURES / f"{name}.safetensors", metadata=metadata)
        expected[name] = y(FIXTURES / f"{name}.safetensors")
        change = (expected[name] - expected["base"]).abs().max() / expected["base"].abs().max()
        print(f"{name}: {len(tensors)} tensors, the output changes by {change:.2f}")
        assert change > 0.1, name

    # kohya's file in half precision, as sd-scripts saves it.
    drawn = {name: tuple(it.half() for it in pair) for name, pair in factors(LAYERS).items()}
    tensors = {key: it.half() for key, it in kohya(LAYERS, drawn).items()}
    save("kohya", tensors, read_by_diffusers, {"ss_network_module": "networks.lora", "ss_network_dim": "2"})
    drawn = {name: tuple(it.float() for it in pair) for name, pair in drawn.items()}
    by_formula = merged(updates(LAYERS, drawn))
    assert (by_formula - expected["kohya"]).abs().max() < 1e-5

    # With a text encoder, as most files have it.
    drawn = factors(TEXT, text_encoder)
    tensors |= kohya(TEXT, drawn, "lora_te_text_model_")
    save("kohya_both", tensors, read_by_diffusers)
    assert torch.equal(expected["kohya_both"], expected["kohya"])
    expected["kohya_text"] = read_text_by_diffusers(FIXTURES / "kohya_both.safetensors")
    assert (expected["kohya_text"] - expected["base_text"]).abs().max() > 0.1

    # LyCORIS with `dora_wd` and `wd_on_output`, of all layers but some; 1x1 kernels for a linear layer.
    layers = {name: LAYERS[name] for name in list(LAYERS)[1::2]}
    drawn = factors(layers)
    weights = base.state_dict()
    magnitudes = {}
    for name in layers:
        weight = weights[f"{name}.weight"]
        norm = weight.flatten(1).norm(dim=1).reshape(-1, *[1] * (weight.ndim - 1))
        magnitudes[name] = norm * (1 + 0.3 * torch.rand_like(norm))
    tensors = kohya(layers, drawn)
    tensors |= {f"{kohya_name(name)}.dora_scale": it for name, it in magnitudes.items()}
    wide = kohya_name(f"{BLOCK}.attn1.to_q")
    for part in ["lora_down", "lora_up"]:
        tensors[f"{wide}.{part}.weight"] = tensors[f"{wide}.{part}.weight"][..., None, None]
    save("kohya_dora", tensors, lambda _: merged(updates(layers, drawn), magnitudes))

    # LyCORIS with `use_tucker`: the kernel stands between two of size 1.
    layers = {name: it for name, it in CONV.items() if "resnets.0.conv1" in name or "downsamplers" in name}
    tensors, changes = {}, {}
    for name, (rank, alpha) in layers.items():
        d_output, d_input, *kernel = weights[f"{name}.weight"].shape
        down, up = torch.randn(rank, d_input, 1, 1), torch.randn(d_output, rank, 1, 1)
        mid = 0.5 * torch.randn(rank, rank, *kernel)
        flat = kohya_name(name)
        tensors |= {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up}
        tensors |= {f"{flat}.lora_mid.weight": mid, f"{flat}.alpha": torch.tensor(alpha)}
        update = torch.einsum("ijkl,pi,jr->prkl", mid, up.flatten(1), down.flatten(1))
        changes[name] = alpha / rank * update
    save("kohya_tucker", tensors, lambda _: merged(changes))

    # diffusers, with the configuration in the metadata, and with DoRA.
    for name, options in [("diffusers", {}), ("diffusers_dora", {"use_dora": True})]:
        model, config = attach(**options)
        StableDiffusionPipeline.save_lora_weights(
            FIXTURES,
            unet_lora_layers=get_peft_model_state_dict(model),
            unet_lora_adapter_metadata=config.to_dict(),
            weight_name=f"{name}.safetensors",
        )
        expected[name] = output(model)
        again = read_by_diffusers(FIXTURES / f"{name}.safetensors")
        assert (again - expected[name]).abs().max() < 1e-5, name
    # The model's own method writes names without `unet.`.
    model.save_lora_adapter(FIXTURES, weight_name="diffusers_model.safetensors")
    expected["diffusers_model"] = expected["diffusers_dora"].clone()

    # Without a configuration: alpha is the rank.
    plain = {name: (rank, rank) for name, (rank, _) in LAYERS.items()}
    drawn = factors(plain)
    tensors = {}
    for name, (down, up) in drawn.items():
        tensors |= {f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up}
    save("diffusers_plain", tensors, read_by_diffusers, {"format": "pt"})
    # The older spellings: by processors, and beside the layers.
    tensors = {}
    for name, (down, up) in drawn.items():
        path, _, last = name.rpartition(".to_")
        is_attention = bool(path)
        key = f"unet.{path}.processor.to_{last.removesuffix('.0')}_lora" if is_attention else f"unet.{name}.lora"
        tensors |= {f"{key}.down.weight": down, f"{key}.up.weight": up}
    save("diffusers_old", tensors, read_by_diffusers)
    assert torch.equal(expected["diffusers_old"], expected["diffusers_plain"])

    # ComfyUI: with names of either kind, and with alphas.
    plain = load_file(FIXTURES / "diffusers_plain.safetensors")
    tensors = {key.replace("unet.", "diffusion_model."): it for key, it in plain.items()}
    save("comfy", tensors, lambda path: read_by_diffusers(path, "diffusion_model"))
    drawn = factors(LAYERS)
    tensors = {}
    for name, (down, up) in drawn.items():
        key = f"diffusion_model.{name}"
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        tensors[f"{key}.alpha"] = torch.tensor(LAYERS[name][1]).bfloat16()
    save("comfy_alpha", tensors, lambda _: merged(updates(LAYERS, drawn)))

    save_file({**io, **{f"y.{name}": y for name, y in expected.items()}}, FIXTURES / "io.safetensors")


if __name__ == "__main__":
    main()
