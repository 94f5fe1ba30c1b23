"""From tissue to a B-mode image: scatterers, pulse, beam, envelope, attenuation, log compression.

The physics and its sources are in `factory.datasets.phantom`.
"""

import functools
from dataclasses import dataclass

import numpy as np
from scipy import fft

SPEED_OF_SOUND = 1.54
"""mm per microsecond, in soft tissue."""
_NEPER_PER_DB = np.log(10.0) / 20.0


@dataclass(frozen=True, kw_only=True)
class Scanner:
    """What a scanner and its operator's settings do to the same tissue.

    Attributes:
        name: recorded as the row's device.
        centre_frequency: MHz.
        cycles: full width at half maximum of the pulse, in periods of the centre frequency.
        f_number: focal depth over aperture: the beam is wavelength * f_number wide at the focus.
        focus: focal depth as a fraction of the image's depth.
        depth: imaged depth, mm; the image is square.
        dynamic_range: dB shown between black and white.
        gain: dB added to all echoes.
        tgc_error: standard deviation, dB over the whole depth, of the error of time-gain compensation.
        noise: electronic noise, dB relative to glandular tissue at the surface, before compensation.
        gamma: exponent of the grey map after log compression.
        smoothing: width in px of the scanner's lateral and axial display filter (speckle reduction).
    """

    name: str = "phantom-a"
    centre_frequency: float = 6.0
    cycles: float = 2.6
    f_number: float = 3.0
    focus: float = 0.45
    depth: float = 38.0
    dynamic_range: float = 54.0
    gain: float = 0.0
    tgc_error: float = 5.0
    noise: float = -50.0
    gamma: float = 1.0
    smoothing: float = 0.55

    def __post_init__(self) -> None:
        for name in ("centre_frequency", "cycles", "f_number", "depth", "dynamic_range", "gamma"):
            if getattr(self, name) <= 0:
                raise ValueError(f"scanner.{name}: {getattr(self, name)} must be positive")
        if not 0 < self.focus <= 1:
            raise ValueError(f"scanner.focus: {self.focus} is outside (0, 1]")
        if self.smoothing < 0 or self.tgc_error < 0:
            raise ValueError("scanner.smoothing and scanner.tgc_error must not be negative")

    @property
    def wavelength(self) -> float:
        """mm."""
        return SPEED_OF_SOUND / self.centre_frequency


SCANNER_A = Scanner()
SCANNER_B = Scanner(
    name="phantom-b", centre_frequency=4.2, cycles=2.2, f_number=4.2, focus=0.6, depth=46.0,
    dynamic_range=70.0, gain=5.0, tgc_error=8.0, noise=-44.0, gamma=0.85, smoothing=0.2,
)  # fmt: skip
"""An older machine: coarser speckle, flatter contrast, deeper and noisier images."""


@dataclass(frozen=True, kw_only=True)
class Tissue:
    """Maps (S, S) float32: echo level in dB, attenuation in dB/(cm MHz), share of scattering grid points,
    and coherent (specular) amplitude."""

    echo: np.ndarray
    attenuation: np.ndarray
    density: np.ndarray
    specular: np.ndarray


def smooth_field(shape: tuple[int, int], sigma: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
    """Gaussian random field (periodic), zero mean, unit variance; `sigma` in px, axial and lateral."""
    spectrum = fft.rfft2(rng.standard_normal(shape, np.float32)) * _field_filter(shape, sigma)
    field = fft.irfft2(spectrum, shape)
    return (field - field.mean()) / max(float(field.std()), 1e-6)


@functools.lru_cache(maxsize=128)
def _field_filter(shape: tuple[int, int], sigma: tuple[float, float]) -> np.ndarray:
    fy = fft.fftfreq(shape[0])[:, None] * sigma[0]
    fx = fft.rfftfreq(shape[1])[None, :] * sigma[1]
    return np.exp(-2 * np.pi**2 * (fy**2 + fx**2)).astype(np.float32)


@dataclass(frozen=True)
class _Optics:
    """Precomputed response of a scanner on the grid of one image size.

    `oversampling` axial samples per px; `first`, `pulse`: first bin and complex gain of the pass band around the
    centre frequency; `beam`: (rows, S) lateral transfer function per depth.
    """

    oversampling: int
    first: int
    pulse: np.ndarray
    beam: np.ndarray
    rows: int


@functools.lru_cache(maxsize=16)
def _optics(scanner: Scanner, size: int) -> _Optics:
    pixel = scanner.depth / size
    carrier = 2.0 / scanner.wavelength * scanner.depth  # cycles of the echo over the image's depth
    pulse_sigma = scanner.cycles * scanner.wavelength / 2 / 2.355  # mm
    bandwidth = scanner.depth / (2 * np.pi * pulse_sigma)  # standard deviation in bins
    oversampling = int(np.ceil((carrier + 3 * bandwidth) * 2 / size))
    rows = 2 * size
    first = max(0, round(carrier) - size)
    bins = np.arange(first, min(first + rows, oversampling * size // 2 + 1))
    pulse = np.exp(-0.5 * ((bins - carrier) / bandwidth) ** 2)
    depth = (np.arange(rows) + 0.5) / rows
    spread = np.abs(depth - scanner.focus) / scanner.f_number * scanner.depth * 0.16
    width = np.hypot(scanner.wavelength * scanner.f_number, spread) / 2.355 / pixel  # sigma, px
    beam = np.exp(-2 * np.pi**2 * (width[:, None] * fft.fftfreq(size)[None, :]) ** 2)
    return _Optics(
        oversampling=oversampling,
        first=first,
        pulse=pulse.astype(np.float32)[:, None],
        beam=beam.astype(np.float32),
        rows=rows,
    )


def scan(scanner: Scanner, tissue: Tissue, rng: np.random.Generator) -> np.ndarray:
    """B-mode image, uint8 (S, S), of tissue maps (S, S)."""
    size = len(tissue.echo)
    optics = _optics(scanner, size)
    loss = _attenuation_loss(scanner, tissue.attenuation, rng)
    amplitude = np.exp(_NEPER_PER_DB * tissue.echo) / np.sqrt(tissue.density)
    scatterers = rng.standard_normal((size, optics.oversampling, size), np.float32)
    scatterers *= rng.random(scatterers.shape, np.float32) < tissue.density[:, None]
    scatterers *= (amplitude / np.sqrt(optics.oversampling))[:, None]
    scatterers[:, 0] += tissue.specular * 2.2
    scatterers *= np.exp(-_NEPER_PER_DB * loss)[:, None]

    spectrum = fft.rfft(scatterers.reshape(-1, size), axis=0)
    band = spectrum[optics.first : optics.first + len(optics.pulse)] * optics.pulse
    baseband = fft.ifft(band, n=optics.rows, axis=0)  # demodulated: a shift of the band leaves |.| unchanged
    focused = fft.ifft(fft.fft(baseband, axis=1) * optics.beam, axis=1)
    focused /= _reference(scanner, size)

    shape = (2, optics.rows, size)
    noise = rng.standard_normal(shape, np.float32) * np.float32(10 ** (scanner.noise / 20) / np.sqrt(2))
    signal = focused + noise[0] + 1j * noise[1]
    gain = np.repeat(_time_gain(scanner, size), 2)[:, None]
    envelope = np.abs(signal)
    decibel = 20 * np.log10(np.maximum(envelope, 1e-7)) + gain + scanner.gain
    return _display(scanner, decibel.reshape(size, 2, size).mean(axis=1), rng)


def _attenuation_loss(scanner: Scanner, attenuation: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """dB lost on the way to each px and back, (S, S); beams have width, so neighbours share it."""
    size = len(attenuation)
    per_px = attenuation * np.float32(2 * scanner.depth / 10 / size * scanner.centre_frequency)
    loss = np.cumsum(per_px, axis=0)
    soft = fft.irfft(
        fft.rfft(loss, axis=1) * _field_filter((1, size), (1e-6, 1.6 * size / 128)), size, axis=1
    )
    tilt = rng.normal() * scanner.tgc_error
    return (soft + tilt * np.linspace(0, 1, size, dtype=np.float32)[:, None]).astype(np.float32)


def _time_gain(scanner: Scanner, size: int) -> np.ndarray:
    """dB of compensation per row, for a mean tissue of 0.62 dB/(cm MHz): less than glandular tissue loses."""
    return 0.62 * 2 * scanner.depth / 10 * scanner.centre_frequency * (np.arange(size) + 0.5) / size


@functools.lru_cache(maxsize=16)
def _reference(scanner: Scanner, size: int) -> np.ndarray:
    """Root mean square of the focused echo of unit-level tissue per row, so that gain is in known units."""
    optics = _optics(scanner, size)
    energy = np.sum(optics.pulse**2) * size / optics.rows**2
    lateral = np.mean(optics.beam**2, axis=1)
    return np.sqrt(energy * lateral).astype(np.float32)[:, None]


def _display(scanner: Scanner, decibel: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Log-compressed grey levels, uint8: average glandular tissue a little above the middle."""
    size = decibel.shape[0]
    if scanner.smoothing:
        sigma = (scanner.smoothing * size / 128, scanner.smoothing * 1.2 * size / 128)
        padded = np.pad(decibel, 8, mode="reflect")
        spectrum = fft.rfft2(padded) * _field_filter(padded.shape, sigma)
        decibel = fft.irfft2(spectrum, padded.shape)[8:-8, 8:-8]
    level = 0.55 + (decibel + rng.normal() * 1.5) / scanner.dynamic_range
    grey = np.clip(level, 0, 1) ** scanner.gamma
    return np.round(255 * grey).astype(np.uint8)
