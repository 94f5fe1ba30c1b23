"""Low-rank adapters on a UNet's attention (Hu et al. 2022), in peft's own format."""

import json
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from factory.generators.checkpoints import part_files
from factory.generators.latent_diffusion import LORA_TARGETS

TRAINED_ADAPTER = "trained"
"""Name in memory of the adapter that training changes."""
_PEFT_PREFIX = "base_model.model."


def add_lora(unet: UNet2DConditionModel, rank: int, seed: int = 0, name: str = TRAINED_ADAPTER) -> None:
    """Add a low-rank adapter that changes nothing at first (B = 0), with lora_alpha = rank."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet.add_adapter(
            LoraConfig(r=rank, lora_alpha=rank, target_modules=list(LORA_TARGETS)), adapter_name=name
        )


def has_lora(unet: UNet2DConditionModel) -> bool:
    """Whether any adapter is attached."""
    return bool(getattr(unet, "peft_config", None))


def merge_lora(unet: UNet2DConditionModel) -> None:
    """Fold all adapters into the weights and detach them."""
    if has_lora(unet):
        unet.fuse_lora()
        unet.unload_lora()


def save_lora(unet: UNet2DConditionModel, folder: Path) -> None:
    """Write the trained adapter, loadable by peft and diffusers; equal adapters have equal bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(unet, adapter_name=TRAINED_ADAPTER)
    tensors = {_PEFT_PREFIX + name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = unet.peft_config[TRAINED_ADAPTER].to_dict()
    # Sets print in the order of this process's hash seed.
    plain = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}
    plain["inference_mode"] = True
    text = json.dumps(plain, indent=2, sort_keys=True, default=lambda v: getattr(v, "value", str(v)))
    (folder / "adapter_config.json").write_text(text + "\n")


def load_lora(unet: UNet2DConditionModel, folder: Path, name: str) -> None:
    """Add a saved adapter under `name`, failing on any key that is missing or not known."""
    part_files(folder.parent, folder.name)
    config = LoraConfig.from_pretrained(str(folder))
    config.inference_mode = False
    state = {
        key.removeprefix(_PEFT_PREFIX): value
        for key, value in load_file(folder / "adapter_model.safetensors").items()
    }
    unet.add_adapter(config, adapter_name=name)
    expected = {k: v.shape for k, v in get_peft_model_state_dict(unet, adapter_name=name).items()}
    found = {k: v.shape for k, v in state.items()}
    if expected != found:
        different = sorted(set(expected.items()) ^ set(found.items()))
        raise ValueError(
            f"{folder}: the adapter does not fit the UNet of the base: {len(different)} keys differ, "
            f"first {different[0][0]}"
        )
    set_peft_model_state_dict(unet, state, adapter_name=name)
