"""A recipe: one choice of every component, as a frozen value.

A recipe is what a Python function returns; `factory recipes` lists the built-in ones and `module:function`
names any other. What changes pixels or masks enters `fingerprint`; how a generator is trained enters through
the digest of the weights that came out, and filters only mark, so neither does.
"""

from dataclasses import dataclass

from factory.curation.filters import BlankImage, DegenerateMask, SimilarityBand
from factory.diffusion.sampling import Sampling
from factory.generators.latent_diffusion import LatentDiffusion
from factory.sources.masks import DeformedEllipse, RealMasks
from factory.sources.prompts import BiradsTemplate, LabelPrompt
from factory.synthesis.annotators import RequestedMask
from factory.training.objectives import NoisePrediction
from factory.training.settings import TrainingSettings
from schemas.identity import fingerprint


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is computed, from a training row to an annotated image.

    Attributes:
        name: as on the command line.
        paper: the publication it follows.
        summary: one line for `factory recipes`.
        generator: base checkpoint, conditioning, trained part and resolution.
        objectives: losses, summed with their weights.
        training: optimisation.
        masks: where requested masks come from.
        prompts: where prompts come from; also describes the training rows.
        sampling: noise scheduler, steps, guidance scale.
        annotator: how a generated image gets its mask.
        filters: marks on every row of the stream.
    """

    name: str
    paper: str
    summary: str
    generator: LatentDiffusion
    objectives: tuple[NoisePrediction, ...] = (NoisePrediction(),)
    training: TrainingSettings
    masks: DeformedEllipse | RealMasks | None
    prompts: BiradsTemplate | LabelPrompt
    backgrounds: None = None
    sampling: Sampling
    guidances: tuple[()] = ()
    annotator: RequestedMask | None = RequestedMask()
    filters: tuple[DegenerateMask | BlankImage | SimilarityBand, ...]

    @property
    def fingerprint(self) -> str:
        """Hash of every part that changes a requested mask, a prompt, a pixel or a label mask."""
        parts = (self.generator, self.masks, self.prompts, self.backgrounds, self.sampling, self.guidances, self.annotator)
        return fingerprint(parts)

    def check(self) -> None:
        pass
