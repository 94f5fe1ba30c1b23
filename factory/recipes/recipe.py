"""A recipe: one choice of every component, as a frozen value.

A recipe is what a Python function returns; `factory recipes` lists the built-in ones and `module:function`
names any other. What changes pixels or masks enters `fingerprint`; how a generator is trained enters through
the digest of the weights that came out, and filters only mark, so neither does.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from factory.curation.filters import BlankImage, DegenerateMask, SimilarityBand
from factory.diffusion.layout_guidance import LayoutGuidance
from factory.diffusion.masked_blend import MaskedBlend
from factory.diffusion.sampling import Sampling
from factory.generators.latent_diffusion import LatentDiffusion
from factory.sources.backgrounds import HealedLesions, RealNormals
from factory.sources.captions import CaptionTable
from factory.sources.mask_models import CurvatureGAN, MaskDiffusion
from factory.sources.masks import DeformedEllipse, RealMasks
from factory.sources.prompts import BiradsTemplate, LabelPrompt
from factory.sources.trigger import TriggerWord
from factory.synthesis.annotators import RequestedMask
from factory.synthesis.attention_annotator import AttentionOtsu
from factory.synthesis.eroded_mask import ErodedMask
from factory.training.masked_denoising import MaskedDenoising
from factory.training.objectives import NoisePrediction
from factory.training.region_attention import RegionAttention
from factory.training.segmenter_stage import SegmenterStage
from factory.training.settings import TrainingSettings
from factory.training.sketch_perception import SketchPerception
from factory.training.vae_stage import VAEStage
from schemas.identity import fingerprint

Objective = NoisePrediction | MaskedDenoising | RegionAttention | SketchPerception
Masks = DeformedEllipse | RealMasks | CurvatureGAN | MaskDiffusion
Prompts = BiradsTemplate | LabelPrompt | CaptionTable | TriggerWord
Backgrounds = RealNormals | HealedLesions
Guidance = LayoutGuidance | MaskedBlend
Annotator = RequestedMask | ErodedMask | AttentionOtsu
Filter = DegenerateMask | BlankImage | SimilarityBand


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is computed, from a training row to an annotated image.

    Attributes:
        name: as on the command line.
        paper: the publication it follows.
        summary: one line for `factory recipes`.
        generator: base checkpoint, conditioning, trained part and resolution.
        objectives: losses, summed with their weights.
        training: optimisation of the generator.
        vae_stage: how `factory train --part vae` fine-tunes the autoencoder.
        segmenter_stage: how `factory train --part segmenter` trains the segmenter that judges synthetic images.
        masks: where requested masks come from; None where images have none.
        prompts: where prompts come from; also describes the training rows.
        backgrounds: real images into which the lesion is put; None where whole images are made.
        sampling: noise scheduler, steps, guidance scale.
        guidances: what steers the denoising loop beside the prompt.
        annotator: how a generated image gets its mask; None where it gets none.
        filters: marks on every row of the stream.
    """

    name: str
    paper: str
    summary: str
    generator: LatentDiffusion
    objectives: tuple[Objective, ...] = (NoisePrediction(),)
    training: TrainingSettings
    vae_stage: VAEStage = VAEStage()
    segmenter_stage: SegmenterStage = SegmenterStage()
    masks: Masks | None
    prompts: Prompts
    backgrounds: Backgrounds | None = None
    sampling: Sampling
    guidances: tuple[Guidance, ...] = ()
    annotator: Annotator | None = RequestedMask()
    filters: tuple[Filter, ...]

    @property
    def fingerprint(self) -> str:
        """Hash of every part that changes a requested mask, a prompt, a pixel or a label mask."""
        return fingerprint(
            (
                self.generator,
                self.masks,
                self.prompts,
                self.backgrounds,
                self.sampling,
                self.guidances,
                self.annotator,
            )
        )

    def check(self) -> None:
        """Refuse components that cannot work together, before any work.

        Raises:
            ValueError: naming the fields and what to choose instead.
        """
        problems = list(self._problems())
        if problems:
            raise ValueError(f"recipe {self.name}: " + "; ".join(problems))

    def _problems(self) -> Iterator[str]:
        conditioning = self.generator.conditioning
        blends = any(isinstance(item, MaskedBlend) for item in self.guidances)
        paints = blends or conditioning.uses_inpaint
        needing = {
            f"generator.conditioning {type(conditioning).__name__}": conditioning.uses_mask
            or conditioning.uses_inpaint,
            f"annotator {type(self.annotator).__name__}": self.annotator is not None
            and self.annotator.needs_mask,
            "backgrounds": self.backgrounds is not None,
            **{f"guidances {type(item).__name__}": True for item in self.guidances},
        }
        if self.masks is None:
            for name, needs in needing.items():
                if needs:
                    yield f"{name} needs requested masks, and masks is None; choose a source of masks"
        if paints and self.backgrounds is None:
            what = (
                "guidances MaskedBlend" if blends else f"generator.conditioning {type(conditioning).__name__}"
            )
            yield f"{what} puts lesions into backgrounds, and backgrounds is None; choose RealNormals or HealedLesions"
        if self.backgrounds is not None and not paints:
            yield (
                f"backgrounds {type(self.backgrounds).__name__} would not be used; add MaskedBlend to guidances, or "
                "use generator.conditioning TextAndInpaint"
            )
        yield from self._token_problems()
        kinds = [type(item).__name__ for item in self.objectives]
        if len(set(kinds)) < len(kinds) or not kinds:
            yield f"objectives: want at least one and no two of a kind, got {kinds}"
        if self.training.horizontal_flip and isinstance(self.prompts, CaptionTable):
            yield "training.horizontal_flip: captions say where the lesion lies, a mirrored image contradicts them"

    def _token_problems(self) -> Iterator[str]:
        """Attention is read at words of the prompt: every prompt must have them."""
        known = self._prompt_words()
        for item in (*self.objectives, *self.guidances, self.annotator):
            for word in getattr(item, "words", ()):
                if word not in known:
                    yield (
                        f"{type(item).__name__} reads the attention of {word!r}, which prompts "
                        f"{type(self.prompts).__name__} does not write in every prompt"
                    )
        for token, _ in self.generator.placeholders:
            if token not in known:
                yield f"generator.placeholders: {token!r} is in no prompt of {type(self.prompts).__name__}"
        if isinstance(self.prompts, CaptionTable):
            missing = {word for word in known if word.startswith("<")} - {
                t for t, _ in self.generator.placeholders
            }
            if missing:
                yield f"prompts.prefix: {', '.join(sorted(missing))} is none of generator.placeholders"

    def _prompt_words(self) -> frozenset[str]:
        """Words that stand in every prompt of the recipe."""
        prompts = self.prompts
        if isinstance(prompts, CaptionTable):
            text = prompts.prefix
        elif isinstance(prompts, TriggerWord):
            text = prompts.prompt
        elif isinstance(prompts, LabelPrompt):
            text = prompts.template
        else:
            text = ""  # its two templates differ
        return frozenset(text.replace(".", " ").replace(",", " ").split())
