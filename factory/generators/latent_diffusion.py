"""A latent diffusion generator: which base, which conditions, which part is trained."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from factory.generators.checkpoints import (
    BASE_PARTS,
    check_built_on,
    check_generator,
    digest_base,
    digest_part,
    digest_parts,
    read_manifest,
    weight_variant,
)
from factory.generators.conditioning import Conditioning, TextAndMask
from schemas.identity import canonical, execution_field

if TYPE_CHECKING:
    from factory.generators.loaded import LoadedGenerator

TINY_BASE = Path(__file__).resolve().parents[1] / "assets" / "base"
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
_HUB_FILES = [f"{part}/{name}" for part in BASE_PARTS for name in ("*.json", "*.txt", "*.safetensors")]


@dataclass(frozen=True, kw_only=True)
class Trainable:
    """Which weights are trained; the VAE and the text encoder never are.

    Attributes:
        unet: "frozen", "full", or "lora" (low-rank adapters on to_q, to_k, to_v, to_out.0 of every self- and
            cross-attention; the paper's parameter counts hold for exactly these, Pan et al. 2025, Table 2).
        controlnet: whether the ControlNet is trained. Pan et al. train "jointly" without saying what; the
            default trains UNet and ControlNet.
        lora_rank: rank r; lora_alpha = r, since the paper adds AB with factor 1.
    """

    unet: Literal["frozen", "full", "lora"] = "full"
    controlnet: bool = True
    lora_rank: int = 8

    def __post_init__(self) -> None:
        if self.unet not in ("frozen", "full", "lora"):
            raise ValueError(f"unet={self.unet!r}: want frozen, full or lora")
        if self.lora_rank < 1:
            raise ValueError(f"lora_rank={self.lora_rank}: want at least 1")


@dataclass(frozen=True, kw_only=True)
class LatentDiffusion:
    """A latent diffusion model over a base checkpoint in diffusers format.

    Attributes:
        base: "tiny" (the base shipped with the factory), a local diffusers folder, or a hub id. Where the
            weights lie is execution; which weights they are enters a plan by their digest.
        conditioning: what goes in beside the noise.
        trainable: what training changes.
        resolution: side of the square images, px; a multiple of eight.
        vae: folder of a fine-tuned autoencoder (`factory train --part vae`) in the place of the base's.
        placeholders: (token, word) pairs: tokens added to the text encoder whose embedding is, and stays, the
            mean of the word's pieces (Shentu et al. 2025; their code keeps the first piece only).
    """

    base: str = execution_field("tiny")
    conditioning: Conditioning = field(default_factory=TextAndMask)
    trainable: Trainable = field(default_factory=Trainable)
    resolution: int = 512
    vae: str | None = execution_field(None)
    placeholders: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        if self.resolution < 8 or self.resolution % 8:
            raise ValueError(f"resolution={self.resolution}: want a positive multiple of 8 px")
        if self.trainable.unet == "frozen" and not self.trains_controlnet:
            raise ValueError("trainable: nothing would be trained (unet='frozen' and no ControlNet)")
        if self.trainable.unet != "full" and (self.conditioning.uses_class or self.conditioning.uses_inpaint):
            raise ValueError(
                f"trainable.unet={self.trainable.unet!r}: {type(self.conditioning).__name__} adds weights to the UNet "
                "itself, so all of it must be trained; use unet='full'"
            )
        tokens = [token for token, _ in self.placeholders]
        if len(set(tokens)) < len(tokens) or any(" " in token or not token for token in tokens):
            raise ValueError(f"placeholders: want distinct tokens without spaces, got {tokens}")

    @property
    def trains_controlnet(self) -> bool:
        return self.trainable.controlnet and self.conditioning.uses_mask

    def base_folder(self) -> Path:
        """The local folder of the base; a hub id is fetched (safetensors and configs only) or found in the cache.

        Raises:
            FileNotFoundError: neither a folder nor a model that can be fetched.
        """
        if self.base == "tiny":
            return TINY_BASE
        folder = Path(self.base).expanduser()
        if folder.is_dir():
            return folder
        if folder.is_absolute() or self.base.startswith(".") or self.base.count("/") != 1:
            raise FileNotFoundError(
                f"base={self.base}: no such folder; give 'tiny', a local diffusers folder or a hub id (owner/name)"
            )
        return _from_hub(self.base)

    def vae_folder(self) -> Path:
        """The folder whose `vae/` is used: the base's, or that of the fine-tuned one.

        Raises:
            FileNotFoundError: `vae` names no folder.
        """
        if self.vae is None:
            return self.base_folder()
        folder = Path(self.vae).expanduser()
        if not (folder / "vae").is_dir():
            raise FileNotFoundError(
                f"generator.vae={self.vae}: {folder / 'vae'} does not exist; `factory train --part vae` makes it"
            )
        return folder

    def ground(self) -> dict[str, str]:
        """Digests of the weights upon which training starts: "base", and "vae" where it is another one."""
        digests = {"base": digest_base(self.base_folder())}
        if self.vae is not None:
            digests["vae"] = digest_part(self.vae_folder(), "vae")
        return digests

    def weights(self, checkpoint: Path | None = None, adapters: tuple[Path, ...] = ()) -> dict[str, str]:
        """Digest of every weight set used, by part: "base", then "vae", "controlnet", "unet", "unet_lora", "adapter_0", ….

        Reads bytes only; no torch. Also checks that the parts belong together.

        Raises:
            FileNotFoundError: a part is missing.
            ValueError: the checkpoint is of another generator, or was trained upon other weights.
        """
        digests = self.ground()
        if checkpoint is not None:
            check_generator(checkpoint, canonical(self))
            check_built_on(checkpoint, digests)
            digests |= digest_parts(checkpoint)
        below = dict(digests)
        for number, adapter in enumerate(adapters):
            self.check_adapter(adapter)
            check_built_on(adapter, below)
            digests[f"adapter_{number}"] = digest_parts(adapter)["unet_lora"]
        return digests

    def load(
        self,
        checkpoint: Path | None = None,
        *,
        device: str = "cpu",
        dtype: str = "float32",
        adapters: tuple[Path, ...] = (),
        adapt_from: Path | None = None,
        seed: int = 0,
    ) -> "LoadedGenerator":
        """The model in memory, trainable parts with requires_grad.

        Args:
            checkpoint: trained parts; without it the trainable parts start fresh (ControlNet copied from the
                UNet with zero-initialised outputs, LoRA with B = 0), so the output equals the base's.
            device: torch device.
            dtype: "float32", "bfloat16" or "float16".
            adapters: LoRA checkpoints adapted from `checkpoint`, all added with factor 1.
            adapt_from: an earlier checkpoint, of any trainable part, whose weights become the frozen ground
                upon which this generator's trainable part is trained (a new domain).
            seed: of the fresh parts' random initialisation.

        Raises:
            FileNotFoundError, ValueError: as in `weights`, or the base does not fit the resolution.
        """
        from factory.generators.loading import load_generator

        return load_generator(
            self,
            checkpoint=checkpoint,
            device=device,
            dtype=dtype,
            adapters=adapters,
            adapt_from=adapt_from,
            seed=seed,
        )

    def check_adapter(self, adapter: Path) -> None:
        """Refuse a checkpoint that is no adapter for this generator, with a ValueError that says why."""
        wanted = canonical(self)
        found = read_manifest(adapter)["generator"]
        for name in ("conditioning", "resolution", "placeholders"):
            if found.get(name) != wanted[name]:
                raise ValueError(
                    f"{adapter}: adapter of another generator: {name} is {found.get(name)} in the adapter and "
                    f"{wanted[name]} here"
                )
        if not (Path(adapter) / "unet_lora").is_dir():
            raise ValueError(
                f"{adapter}: has no unet_lora; an adapter is a checkpoint trained with unet='lora' "
                "(`factory train --adapt-from CHECKPOINT --lora-rank R`)"
            )


def _from_hub(name: str) -> Path:
    """Fetch the parts of a base from the hub: full-precision safetensors, or half-precision where there are no others."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        folder = Path(
            snapshot_download(name, allow_patterns=_HUB_FILES, ignore_patterns=["*non_ema*", "*.fp16.*"])
        )
        try:
            for part in ("vae", "unet", "text_encoder"):
                weight_variant(folder, part)
        except FileNotFoundError:
            folder = Path(snapshot_download(name, allow_patterns=_HUB_FILES, ignore_patterns=["*non_ema*"]))
        return folder
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise FileNotFoundError(
            f"base={name}: no such local folder, and the hub could not serve it ({type(error).__name__}); "
            "give a local diffusers folder, or run once where the hub can be reached"
        ) from error
