"""How a picture of Deformed Digits is drawn.

The 1,797 handwritten digits (8 x 8 pixels) that come with scikit-learn are drawn on crops of the
two photographs that come with it: each at a random scale (8x range), rotation, shear, aspect and
smooth elastic warp, several to a picture, partly hiding one another. Nothing is downloaded.

What is shared by no two splits: a source digit, a region of a photograph. Which digit and which
region belong to which split does not depend on the seed, so a test split of one seed is held
out from the train split of any other.
"""

import importlib
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

CLASS_NAMES = tuple("0123456789")
SPLITS = ("train", "val", "test")

_DIGIT_SHARES = {"train": (0.0, 0.62), "val": (0.62, 0.72), "test": (0.72, 1.0)}
_REGION_SHARES = {"train": (0.0, 0.55), "val": (0.55, 0.75), "test": (0.75, 1.0)}
_CELL = 8  # grid pixels of a glyph for one pixel of its 8 x 8 source
_PAD = 2  # empty source pixels around a glyph

__all__ = [
    "CLASS_NAMES",
    "SPLITS",
    "DeformedDigitsSettings",
    "DigitBox",
    "check_drawing_tools",
    "draw_picture",
    "source_digits",
]


@dataclass(frozen=True)
class DeformedDigitsSettings:
    """How pictures are drawn.

    Attributes:
        image_size: width and height of a picture, in pixels.
        min_digits: fewest digits of a picture.
        max_digits: most digits of a picture.
        min_height: height of the smallest upright digit, as a share of the picture's.
        max_height: of the largest. Heights are log-uniform between the two.
        rotation: largest rotation to either side, in degrees.
        shear: largest shear to either side (x per y).
        aspect: largest |log| of the stretch in x, whose inverse is the stretch in y.
        warp: strength of the elastic warp: standard deviation of the displacements of a 5 x 5
            control grid, as a share of the digit's height. At 0.08 many digits are unreadable.
        max_overlap: largest share of a digit that another may hide, and largest share of the
            smaller of two boxes that may lie in the other.
    """

    image_size: int = 192
    min_digits: int = 2
    max_digits: int = 5
    min_height: float = 1 / 12
    max_height: float = 2 / 3
    rotation: float = 45.0
    shear: float = 0.3
    aspect: float = 0.25
    warp: float = 0.05
    max_overlap: float = 0.25

    def __post_init__(self) -> None:
        if self.image_size < 32:
            raise ValueError(f"image_size is {self.image_size}; expected 32 pixels or more.")
        if not 1 <= self.min_digits <= self.max_digits <= 20:
            raise ValueError(
                f"min_digits, max_digits are {self.min_digits}, {self.max_digits}; "
                "expected 1 <= min_digits <= max_digits <= 20."
            )
        if not 0.0 < self.min_height <= self.max_height <= 0.8:
            raise ValueError(
                f"min_height, max_height are {self.min_height}, {self.max_height}; "
                "expected 0 < min_height <= max_height <= 0.8 (shares of the picture)."
            )
        for name, most in {
            "rotation": 180,
            "shear": 1,
            "aspect": 1,
            "warp": 0.2,
            "max_overlap": 1,
        }.items():
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 0 to {most}.")


@dataclass(frozen=True)
class DigitBox:
    """One drawn digit: its class and the tight box around the pixels of it that can be seen.

    Attributes:
        label: the digit, 0 to 9.
        box: (x1, y1, x2, y2) in pixels of the picture, from 0, the last two exclusive.
        source: index of the handwritten digit in `sklearn.datasets.load_digits`.
        occluded: another digit hides part of this one.
    """

    label: int
    box: tuple[int, int, int, int]
    source: int
    occluded: bool


def draw_picture(
    split: str, seed: int, index: int, settings: DeformedDigitsSettings | None = None
) -> tuple[np.ndarray, np.ndarray, list[DigitBox]]:
    """Draw picture number `index` of a split; the same arguments give the same picture.

    Returns:
        (picture, labels, digits): uint8 (S, S, 3) in BGR order; uint8 (S, S), 0 background and
        1 + digit where a digit's ink covers at least half the pixel; the digits from back to front.
    """
    settings = settings or DeformedDigitsSettings()
    sources = _sources(split)
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    picture = _draw_background(sources.regions, settings.image_size, rng)
    owners = np.zeros((settings.image_size, settings.image_size), np.uint8)
    inked: list[tuple[int, int, int]] = []  # label, source, number of ink pixels before occlusion
    wanted = int(rng.integers(settings.min_digits, settings.max_digits + 1))
    for _ in range(200 * wanted):  # a digit that finds no room is drawn anew
        if len(inked) == wanted:
            break
        choice = int(rng.integers(len(sources.glyphs)))
        field = _render(sources.glyphs[choice], settings, rng)
        place = _find_room(field.ink, owners, [count for *_, count in inked], settings, rng)
        if place is None:
            continue
        _paint(picture[place], field, rng)
        owners[place][field.ink] = len(inked) + 1
        inked.append(
            (sources.labels[choice], sources.indices[choice], int(np.count_nonzero(field.ink)))
        )
    labels = np.zeros_like(owners)
    digits = []
    for number, (label, source, count) in enumerate(inked, start=1):
        seen = owners == number
        labels[seen] = label + 1
        occluded = int(np.count_nonzero(seen)) < count
        digits.append(DigitBox(label, _tight_box(seen), source, occluded))
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8), labels, digits


def source_digits(split: str) -> list[int]:
    """Indices into `sklearn.datasets.load_digits` of the digits that a split may draw.

    Each class is divided by the same shares; the division is the same for every seed.
    """
    targets = _require("sklearn.datasets", "scikit-learn").load_digits().target
    rng = np.random.default_rng(20170317)
    low, high = _DIGIT_SHARES[split]
    chosen: list[int] = []
    for label in range(len(CLASS_NAMES)):
        members = rng.permutation(np.flatnonzero(targets == label))
        first, last = round(low * len(members)), round(high * len(members))
        chosen += members[first:last].tolist()
    return sorted(chosen)


@dataclass(frozen=True)
class _Glyph:
    """A digit upsampled smoothly.

    Attributes:
        ink: float32 (G, G), smooth, about 0 (paper) to 1 (middle of a stroke).
        centre: (x, y) of the inked box's centre, in grid pixels.
        size: (width, height) of the inked box, in grid pixels.
    """

    ink: np.ndarray
    centre: tuple[float, float]
    size: tuple[float, float]


@dataclass(frozen=True)
class _Sources:
    """What a split is drawn from; `regions` are float32 (h, w, 3), BGR."""

    glyphs: list[_Glyph]
    labels: list[int]
    indices: list[int]
    regions: list[np.ndarray]


@dataclass(frozen=True)
class _Field:
    """A digit as drawn, on the patch of the picture that it needs.

    Attributes:
        alpha: float32 (h, w), share of each pixel covered by ink.
        depth: float32 (h, w), 0 at a stroke's edge to 1 in its middle, for shading.
        ink: bool (h, w), alpha >= 0.5; touches all four borders of the tight box.
        height: height of the upright digit, in pixels.
    """

    alpha: np.ndarray
    depth: np.ndarray
    ink: np.ndarray
    height: float


@lru_cache(maxsize=len(SPLITS))
def _sources(split: str) -> _Sources:
    datasets = _require("sklearn.datasets", "scikit-learn")
    digits = datasets.load_digits()
    indices = source_digits(split)
    low, high = _REGION_SHARES[split]
    regions = []
    for photograph in datasets.load_sample_images().images:
        width = photograph.shape[1]
        region = photograph[:, round(low * width) : round(high * width), ::-1]
        regions.append(np.ascontiguousarray(region, dtype=np.float32))
    return _Sources(
        glyphs=[_upsample(digits.images[index]) for index in indices],
        labels=[int(digits.target[index]) for index in indices],
        indices=indices,
        regions=regions,
    )


def _upsample(pixels: np.ndarray) -> _Glyph:
    """Upsample an 8 x 8 digit of values 0 to 16 by `_CELL`, without visible steps.

    Part of the local mean is taken off, so that one threshold neither fills the small hole of an 8
    nor breaks the faint side of a 0.
    """
    cv2 = _require("cv2", "opencv-python-headless")
    padded = np.pad(pixels.astype(np.float32) / 16.0, _PAD)
    side = padded.shape[0] * _CELL
    upsampled = cv2.resize(padded, (side, side), interpolation=cv2.INTER_CUBIC)
    ink = cv2.GaussianBlur(upsampled, (0, 0), 0.3 * _CELL)
    ink -= 0.6 * cv2.GaussianBlur(upsampled, (0, 0), 1.5 * _CELL)
    ink /= np.quantile(ink[ink > 0.5 * ink.max()], 0.7)
    x1, y1, x2, y2 = _tight_box(ink >= 0.4)
    return _Glyph(ink, ((x1 + x2 - 1) / 2, (y1 + y2 - 1) / 2), (x2 - x1, y2 - y1))


def _draw_background(
    regions: list[np.ndarray], image_size: int, rng: np.random.Generator
) -> np.ndarray:
    """A window of a region at a random place, size, small rotation and flip; float32 (S, S, 3)."""
    cv2 = _require("cv2", "opencv-python-headless")
    region = regions[int(rng.integers(len(regions)))]
    scale = rng.uniform(90, 200) / image_size  # source pixels for one pixel of the picture
    angle = math.radians(rng.uniform(-15, 15))
    flip = rng.choice([-1.0, 1.0])
    centre = rng.uniform(0.1, 0.9, 2) * (region.shape[1], region.shape[0])
    cosine, sine = scale * math.cos(angle), scale * math.sin(angle)
    linear = np.array([[flip * cosine, -sine], [flip * sine, cosine]])
    shift = centre - linear @ np.full(2, (image_size - 1) / 2)
    picture = cv2.warpAffine(
        region,
        np.column_stack([linear, shift]),
        (image_size, image_size),
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_REFLECT_101,
    )
    mean = picture.mean(axis=(0, 1))
    contrast, brightness = rng.uniform(0.6, 1.0), rng.uniform(-20, 20)
    return (mean + contrast * (picture - mean) + brightness).astype(np.float32)


def _render(glyph: _Glyph, settings: DeformedDigitsSettings, rng: np.random.Generator) -> _Field:
    """Draw a glyph at a random scale, rotation, shear, aspect, warp and stroke width."""
    cv2 = _require("cv2", "opencv-python-headless")
    low, high = math.log(settings.min_height), math.log(settings.max_height)
    height = settings.image_size * math.exp(rng.uniform(low, high))
    angle = math.radians(rng.uniform(-settings.rotation, settings.rotation))
    stretch = math.exp(rng.uniform(-settings.aspect, settings.aspect))
    rotate = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    shear = np.array([[1.0, rng.uniform(-settings.shear, settings.shear)], [0.0, 1.0]])
    scale = height / glyph.size[1]
    forward = rotate @ shear @ np.diag([stretch, 1.0 / stretch]) * scale
    half = np.abs(forward) @ (np.array(glyph.size) / 2 + _CELL) + 3 * settings.warp * height
    width_px, height_px = (2 * np.ceil(half) + 1).astype(int)

    inverse = np.linalg.inv(forward)
    x = np.arange(width_px, dtype=np.float32) - (width_px - 1) / 2
    y = (np.arange(height_px, dtype=np.float32) - (height_px - 1) / 2)[:, None]
    control = rng.normal(0.0, settings.warp * height, (5, 5, 2)).astype(np.float32)
    moved = cv2.resize(control, (int(width_px), int(height_px)), interpolation=cv2.INTER_CUBIC)
    x, y = x + moved[..., 0], y + moved[..., 1]
    ink = cv2.remap(
        glyph.ink,
        (inverse[0, 0] * x + inverse[0, 1] * y + glyph.centre[0]).astype(np.float32),
        (inverse[1, 0] * x + inverse[1, 1] * y + glyph.centre[1]).astype(np.float32),
        interpolation=cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=0,
    )
    # The ink falls from 1 to 0 over about one source pixel; spread the edge over one drawn pixel.
    softness = min(1.0 / (_CELL * scale), 0.5)
    threshold = rng.uniform(0.34, 0.46)
    alpha = np.clip((ink - threshold) / softness + 0.5, 0.0, 1.0)
    depth = np.clip((ink - threshold) / (1.0 - threshold), 0.0, 1.0)
    x1, y1, x2, y2 = _tight_box(alpha >= 0.5)
    tight = np.s_[y1:y2, x1:x2]
    return _Field(alpha[tight], depth[tight], alpha[tight] >= 0.5, height)


def _find_room(
    ink: np.ndarray,
    owners: np.ndarray,
    ink_counts: list[int],
    settings: DeformedDigitsSettings,
    rng: np.random.Generator,
) -> tuple[slice, slice] | None:
    """A random place in the picture where a digit hides little of the ones drawn before."""
    size = settings.image_size
    height, width = ink.shape
    if height > size or width > size or not ink.any():
        return None
    for _ in range(10):
        x, y = int(rng.integers(size - width + 1)), int(rng.integers(size - height + 1))
        place = np.s_[y : y + height, x : x + width]
        if _hides_little(place, ink, owners, ink_counts, settings.max_overlap):
            return place
    return None


def _hides_little(
    place: tuple[slice, slice],
    ink: np.ndarray,
    owners: np.ndarray,
    ink_counts: list[int],
    max_overlap: float,
) -> bool:
    rows, columns = place
    for number, count in enumerate(ink_counts, start=1):
        seen = owners == number
        x1, y1, x2, y2 = _tight_box(seen)
        overlap_x = min(x2, columns.stop) - max(x1, columns.start)
        overlap_y = min(y2, rows.stop) - max(y1, rows.start)
        if overlap_x <= 0 or overlap_y <= 0:
            continue
        smaller = min((x2 - x1) * (y2 - y1), ink.size)
        if overlap_x * overlap_y > max_overlap * smaller:
            return False
        left = np.count_nonzero(seen) - np.count_nonzero(seen[place] & ink)
        if left < (1.0 - max_overlap) * count:
            return False
    return True


def _paint(patch: np.ndarray, field: _Field, rng: np.random.Generator) -> None:
    """Paint a digit onto its patch of the picture, in a colour that stands out from it."""
    luma_weights = np.array([0.114, 0.587, 0.299])
    around = float(patch[field.ink].mean(axis=0) @ luma_weights)
    ranges = [(15.0, around - 100.0), (around + 100.0, 240.0)]
    lengths = np.maximum([high - low for low, high in ranges], 0.0)
    low, high = ranges[int(rng.choice(2, p=lengths / lengths.sum()))]
    luma = rng.uniform(low, high)
    tint = rng.normal(size=3)
    tint -= tint @ luma_weights
    colour = luma + rng.uniform(20, 110) * tint / np.abs(tint).max()

    height, width = field.ink.shape
    angle = rng.uniform(0.0, 2.0 * math.pi)
    across = np.linspace(-1, 1, width) * math.cos(angle)
    down = np.linspace(-1, 1, height)[:, None] * math.sin(angle)
    light = 18.0 * (across + down) + 30.0 * (field.depth - 0.5)
    alpha = field.alpha[..., None]
    patch += alpha * (np.clip(colour + light[..., None], 0, 255) - patch)


def _tight_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """(x1, y1, x2, y2) around the set pixels, the last two exclusive; zeros where none is set."""
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    if columns.size == 0:
        return 0, 0, 0, 0
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def check_drawing_tools() -> None:
    """Imports what drawing needs.

    Raises:
        ImportError: scikit-learn or OpenCV is missing; the line says how to get it.
    """
    _require("sklearn.datasets", "scikit-learn")
    _require("cv2", "opencv-python-headless")


def _require(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ImportError(
            f"Deformed Digits are drawn with {package}, which is not installed: "
            f"pip install {package}"
        ) from None
