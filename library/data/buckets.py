"""Which size an image is trained at: the list of buckets, the choice among them, scaling and crop arithmetic."""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property

Size = tuple[int, int]
"""Width and height in pixels."""


@dataclass(frozen=True)
class Fit:
    """How one image becomes a training picture."""

    bucket: Size
    """What the picture is cropped to."""
    resized: Size
    """What the image is scaled to before."""
    aspect_error: float
    """Aspect of the bucket less the aspect of the image."""


@dataclass(frozen=True)
class Buckets:
    """The sizes that images may be trained at. Without `enabled` there is one, the resolution."""

    resolution: Size
    enabled: bool = True
    low: int = 256
    """Shortest side; unused with `no_upscale`."""
    high: int = 1024
    """Longest side; unused with `no_upscale`."""
    step: int = 64
    no_upscale: bool = False

    @cached_property
    def predefined(self) -> list[Size]:
        """All buckets, sorted; each covers at most the area of the resolution."""
        if not self.enabled:
            return [self.resolution]
        area = self.resolution[0] * self.resolution[1]
        side = math.isqrt(area) // self.step * self.step
        sizes = {(side, side)}
        for width in range(self.low, self.high + 1, self.step):
            height = min(self.high, area // width // self.step * self.step)
            if height >= self.low:
                sizes |= {(width, height), (height, width)}
        return sorted(sizes)

    def fit(self, size: Size) -> Fit:
        """The bucket of an image of `size`; ValueError when the image is smaller than one step."""
        if self.enabled and self.no_upscale:
            return self._fit_without_upscale(size)
        bucket = self._nearest(size)
        return Fit(bucket, covering(size, bucket), bucket[0] / bucket[1] - size[0] / size[1])

    @cached_property
    def _by_aspect(self) -> tuple[list[float], list[Size]]:
        """Distinct aspects in rising order, each with the first bucket that has it."""
        first: dict[float, Size] = {}
        for width, height in self.predefined:
            first.setdefault(width / height, (width, height))
        aspects = sorted(first)
        return aspects, [first[aspect] for aspect in aspects]

    def _nearest(self, size: Size) -> Size:
        """The bucket of nearest aspect; on a tie the first in the sorted list."""
        if size in self.predefined:
            return size
        aspects, sizes = self._by_aspect
        aspect = size[0] / size[1]
        place = bisect_left(aspects, aspect)
        candidates = range(max(place - 1, 0), min(place + 1, len(aspects)))
        return min((abs(aspects[i] - aspect), sizes[i]) for i in candidates)[1]

    def _fit_without_upscale(self, size: Size) -> Fit:
        """Shrink to the area of the resolution if need be, then floor both sides to the step."""
        width, height = size
        aspect = width / height
        area = self.resolution[0] * self.resolution[1]
        resized = size if width * height <= area else self._shrunk(aspect, area)
        bucket = (resized[0] // self.step * self.step, resized[1] // self.step * self.step)
        if 0 in bucket:
            raise ValueError(
                f"an image of {width}x{height} is too narrow for bucket_no_upscale with bucket_reso_steps {self.step}"
            )
        return Fit(bucket, resized, bucket[0] / bucket[1] - aspect)

    def _shrunk(self, aspect: float, area: int) -> Size:
        """The size of about `area` with one side on the grid, whichever keeps the aspect better."""
        ideal_width = math.sqrt(area * aspect)
        by_width = self._on_grid(ideal_width)
        by_height = self._on_grid(area / ideal_width)
        error_by_width = _error(by_width, self._on_grid(by_width / aspect), aspect)
        error_by_height = _error(self._on_grid(by_height * aspect), by_height, aspect)
        if error_by_width < error_by_height:
            return by_width, _rounded(by_width / aspect)
        return _rounded(by_height * aspect), by_height

    def _on_grid(self, side: float) -> int:
        whole = _rounded(side)
        return whole - whole % self.step


def rounded_limits(low: int, high: int, step: int) -> tuple[int, int]:
    """Bucket limits on the grid: the lower one rounded down, the upper one up."""
    return low // step * step, -(-high // step) * step


def covering(size: Size, bucket: Size) -> Size:
    """The smallest scaled `size` that covers `bucket`."""
    width, height = size
    wider = width / height > bucket[0] / bucket[1]
    scale = bucket[1] / height if wider else bucket[0] / width
    return _rounded(width * scale), _rounded(height * scale)


def centre_crop(resized: Size, bucket: Size) -> tuple[int, int]:
    """Left and top of the middle `bucket` in an image of size `resized`."""
    return max(resized[0] - bucket[0], 0) // 2, max(resized[1] - bucket[1], 0) // 2


def crop_condition(size: Size, bucket: Size) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of the whole image fitted into the bucket, in bucket pixels (SDXL's condition)."""
    bucket_width, bucket_height = bucket
    aspect = size[0] / size[1]
    if bucket_width / bucket_height > aspect:
        width, height = bucket_height * aspect, float(bucket_height)
    else:
        width, height = float(bucket_width), bucket_width / aspect
    left, top = (bucket_width - width) // 2, (bucket_height - height) // 2
    return left, top, left + width, top + height


def _rounded(value: float) -> int:
    return int(value + 0.5)


def _error(width: int, height: int, aspect: float) -> float:
    return abs(width / height - aspect) if height else math.inf
