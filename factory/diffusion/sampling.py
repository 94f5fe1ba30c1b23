"""How an image is drawn from a trained generator: noise schedule, steps, guidance."""

from dataclasses import dataclass
from typing import Literal, get_args

NoiseSchedulerName = Literal["ddim", "dpmpp_2m", "unipc", "euler"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The denoising loop's settings; all of them change pixels.

    Attributes:
        noise_scheduler: "ddim" (Song et al. 2021), "dpmpp_2m" (Lu et al. 2022), "unipc" (Zhao et al. 2023) or
            "euler" (Karras et al. 2022), as diffusers implements them over the base's training schedule.
        num_inference_steps: denoising steps.
        guidance_scale: classifier-free guidance (Ho and Salimans 2022): 1 is the conditional model alone.
        guidance_start, guidance_stop: guidance is on for steps i of n with start ≤ i / n < stop (a limited
            interval saves half the work outside it; Kynkäänniemi et al. 2024).
        eta: share of DDIM's stochastic noise, 0 … 1; other schedules take none.
    """

    noise_scheduler: NoiseSchedulerName = "ddim"
    num_inference_steps: int = 20
    guidance_scale: float = 3.0
    guidance_start: float = 0.0
    guidance_stop: float = 1.0
    eta: float = 0.0

    def __post_init__(self) -> None:
        names = get_args(NoiseSchedulerName)
        if self.noise_scheduler not in names:
            raise ValueError(f"noise_scheduler={self.noise_scheduler!r}: want one of {', '.join(names)}")
        if not 1 <= self.num_inference_steps <= 1000:
            raise ValueError(f"num_inference_steps={self.num_inference_steps}: want 1 … 1000")
        if not self.guidance_scale >= 1.0 or self.guidance_scale == float("inf"):
            raise ValueError(f"guidance_scale={self.guidance_scale}: want a finite number of at least 1")
        if not 0.0 <= self.guidance_start <= self.guidance_stop <= 1.0:
            raise ValueError(
                f"guidance_start={self.guidance_start}, guidance_stop={self.guidance_stop}: want 0 ≤ start ≤ stop ≤ 1"
            )
        if not 0.0 <= self.eta <= 1.0 or (self.eta and self.noise_scheduler != "ddim"):
            raise ValueError(f"eta={self.eta}: want 0 … 1, and 0 for any noise_scheduler but ddim")
