"""Resize and Upsample: one axis after the other, each output a weighted sum of a few positions.

Coordinates are float32, in the order of operations of the specification's formulas, so that nearest
neighbours at ties agree with other runtimes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onnxslim_lab.kernels.activation import wide
from onnxslim_lab.kernels.registry import Array, earlier, kernel
from onnxslim_lab.kernels.shape import positive_axes

Floats = Sequence[float]
F = np.float32


@dataclass(frozen=True)
class Plan:
    """How one axis is resized: lengths, scale and, for tf_crop_and_resize, the part [start, end] of it."""

    length: int
    resized: int
    scale: float
    start: float = 0.0
    end: float = 1.0


@dataclass(frozen=True)
class Method:
    """The attributes of Resize that hold for all axes."""

    mode: str = "nearest"
    transformation: str = "asymmetric"
    nearest: str = "simple"
    cubic: float = -0.75
    exclude_outside: bool = False
    extrapolation: float = 0.0
    antialias: bool = False


def coordinates(plan: Plan, transformation: str) -> Array:
    """Return the position in the input of every output, float32.

    Raises:
        ValueError: The transformation is unknown.
    """
    x = np.arange(plan.resized, dtype=F)
    scale, length, resized = F(plan.scale), plan.length, plan.resized
    half = F(0.5)
    if transformation == "half_pixel" or (transformation == "pytorch_half_pixel" and resized > 1):
        return np.asarray((x + half) / scale - half)
    if transformation == "pytorch_half_pixel":
        return np.zeros_like(x)
    if transformation == "asymmetric":
        return np.asarray(x / scale)
    if transformation == "tf_half_pixel_for_nn":
        return np.asarray((x + half) / scale)
    if transformation == "align_corners":
        real = F(scale * F(length))
        return np.zeros_like(x) if resized == 1 else np.asarray(x * F(length - 1) / (real - F(1)))
    if transformation == "half_pixel_symmetric":
        adjustment = F(resized) / (scale * F(length))
        offset = F(length) / F(2) * (F(1) - adjustment)
        return np.asarray(offset + (x + half) / scale - half)
    if transformation == "tf_crop_and_resize":
        start, end, last = F(plan.start), F(plan.end), F(length - 1)
        if resized == 1:
            return np.asarray(half * (start + end) * last + x)
        return np.asarray(start * last + x * (end - start) * last / F(resized - 1))
    raise ValueError(f"Resize: coordinate_transformation_mode {transformation!r} is not known")


def nearest(x: Array, plan: Plan, rule: str) -> Array:
    """Return the nearest positions, int64, by the rule for ties.

    Raises:
        ValueError: The rule is unknown.
    """
    half = F(0.5)
    rules = {"round_prefer_floor": np.ceil(x - half), "round_prefer_ceil": np.floor(x + half)}
    rules |= {"floor": np.floor(x), "ceil": np.ceil(x)}
    rules["simple"] = rules["ceil" if plan.scale < 1 else "floor"]
    if rule not in rules:
        raise ValueError(f"Resize: nearest_mode {rule!r} is not known")
    return np.clip(rules[rule], 0, max(plan.length - 1, 0)).astype(np.int64)


def cubic_weights(distance: Array, a: float) -> Array:
    """Return Keys' cubic kernel at distances from the output's position."""
    t = np.abs(distance)
    near = ((a + 2) * t - (a + 3)) * t * t + 1
    far = ((t - 5) * t + 8) * t * a - 4 * a
    return np.where(t <= 1, near, np.where(t < 2, far, 0.0))


def taps(x: Array, plan: Plan, method: Method) -> tuple[Array, Array]:
    """Return positions (int64) and weights (float64), both (resized, taps), for linear and cubic modes."""
    reach = 1 if method.mode == "linear" else 2
    stretch = min(plan.scale, 1.0) if method.antialias else 1.0
    floor = np.floor(x.astype(np.float64))
    first = int(np.floor(-reach / stretch)) + 1
    places = floor[:, None] + np.arange(first, reach - first + (reach == 1))
    distance = (places - x[:, None]) * stretch
    if method.mode == "linear":
        weights = np.clip(1 - np.abs(distance), 0, 1)
    else:
        weights = cubic_weights(distance, method.cubic)
    if method.exclude_outside:
        weights = np.where((places < 0) | (places >= plan.length), 0.0, weights)
    if method.exclude_outside or method.antialias:
        weights = weights / weights.sum(1, keepdims=True)
    return np.clip(places, 0, max(plan.length - 1, 0)).astype(np.int64), weights


def taken(x: Array, places: Array, axis: int) -> Array:
    """Return x at the positions along an axis; a plain repetition by strided copies."""
    length = x.shape[axis]
    times = len(places) // length if length else 0
    if times > 1 and np.array_equal(places, np.arange(length * times) // times):
        result = np.empty((*x.shape[:axis], len(places), *x.shape[axis + 1 :]), x.dtype)
        for offset in range(times):
            result[(*[slice(None)] * axis, slice(offset, None, times))] = x
        return result
    return np.take(x, places, axis)


def weighted(x: Array, places: Array, weights: Array, axis: int) -> Array:
    """Return the weighted sums along an axis."""
    side = [-1 if i == axis else 1 for i in range(x.ndim)]
    result: Array | None = None
    for place, weight in zip(places.T, weights.T.astype(x.dtype), strict=True):
        if not weight.any():
            continue
        term = np.take(x, place, axis)
        term *= weight.reshape(side)
        result = term if result is None else np.add(result, term, out=result)
    return np.take(x, places[:, 0], axis) * 0 if result is None else result


def resize(X: Array, axes: Sequence[int], plans: Sequence[Plan], method: Method) -> Array:
    """Return X with the axes resized.

    Raises:
        ValueError: The mode is unknown or an empty axis must grow.
    """
    if method.mode not in {"nearest", "linear", "cubic"}:
        raise ValueError(f"Resize: mode {method.mode!r} is not nearest, linear or cubic")
    exact = method.mode == "nearest"
    integral = X.dtype.kind not in "fV"
    x = X if exact else X.astype(np.float64) if integral else wide(X)
    outside = []
    for axis, plan in sorted(zip(axes, plans, strict=True), key=lambda pair: pair[1].scale):
        if plan.length == 0 and plan.resized:
            raise ValueError(f"Resize: axis {axis} is empty and cannot get the length {plan.resized}")
        cropped = method.transformation == "tf_crop_and_resize"
        if plan.scale == 1 and plan.length == plan.resized and not cropped:
            continue
        place = coordinates(plan, method.transformation)
        if exact:
            x = taken(x, nearest(place, plan, method.nearest), axis)
        else:
            x = weighted(x, *taps(place, plan, method), axis)
        if cropped:
            outside.append((axis, (place < 0) | (place > plan.length - 1)))
    x = x.astype(X.dtype, copy=False)
    if any(mask.any() for _, mask in outside):
        x = x.copy()
        for axis, mask in outside:
            np.moveaxis(x, axis, 0)[mask] = np.asarray(method.extrapolation).astype(X.dtype)
    return x


def planned(
    X: Array,
    axes: Sequence[int],
    scales: Array | None,
    sizes: Array | None,
    policy: str = "stretch",
    roi: Array | None = None,
) -> list[Plan]:
    """Return how the axes are resized, by scales or to sizes.

    Raises:
        ValueError: Not exactly one of them is given, or it does not have one entry per axis.
    """
    factors = np.zeros(0) if scales is None else scales.reshape(-1)
    wanted = np.zeros(0) if sizes is None else sizes.reshape(-1)
    if bool(factors.size) == bool(wanted.size) and axes:
        raise ValueError("Resize: exactly one of scales and sizes must be given")
    given = factors if factors.size else wanted
    if len(given) != len(axes) or (given < 0).any() or (factors <= 0).any():
        raise ValueError(f"Resize: {given.tolist()} must be {len(axes)} positive numbers, one for each axis")
    lengths = [X.shape[axis] for axis in axes]
    if factors.size:
        resized = [int(np.floor(F(n) * F(factor))) for n, factor in zip(lengths, factors, strict=True)]
        ratios = [float(factor) for factor in factors]
    else:
        resized = [int(size) for size in wanted]
        ratios = [size / max(n, 1) for n, size in zip(lengths, resized, strict=True)]
        if policy in {"not_larger", "not_smaller"}:
            common = min(ratios) if policy == "not_larger" else max(ratios)
            ratios = [common] * len(axes)
            resized = [int(np.floor(F(n) * F(common) + F(0.5))) for n in lengths]
        elif policy != "stretch":
            raise ValueError(
                f"Resize: keep_aspect_ratio_policy {policy!r} is not stretch, not_larger or not_smaller"
            )
    if roi is None or not roi.size:
        parts = [(0.0, 1.0)] * len(axes)
    elif roi.size != 2 * len(axes):
        raise ValueError(f"Resize: roi has {roi.size} numbers, expected {2 * len(axes)}")
    else:
        parts = [(float(start), float(end)) for start, end in roi.reshape(2, -1).T]
    rows = zip(lengths, resized, ratios, parts, strict=True)
    return [Plan(length, size, ratio, *part) for length, size, ratio, part in rows]


@kernel("Upsample", since=1)
def Upsample_1(X: Array, *, height_scale: float, width_scale: float, mode: str = "nearest") -> Array:
    """Return X (N, C, H, W) with height and width scaled; mode nearest or bilinear."""
    return Upsample_7(X, scales=[1.0] * (X.ndim - 2) + [height_scale, width_scale], mode=mode)


@kernel("Upsample", since=7)
def Upsample_7(X: Array, *, scales: Floats, mode: str = "nearest") -> Array:
    """Return X with every axis scaled; mode nearest (rounding down) or linear."""
    return Resize_10(X, np.asarray(list(scales), F), mode=mode)


@kernel("Upsample", since=9)
def Upsample_9(X: Array, scales: Array, *, mode: str = "nearest") -> Array:
    """Return X with every axis scaled; mode nearest (rounding down) or linear."""
    return Resize_10(X, scales, mode=mode)


@kernel("Resize", since=10)
def Resize_10(X: Array, scales: Array, *, mode: str = "nearest") -> Array:
    """Return X with every axis scaled; mode nearest (down when growing, up when shrinking) or linear.

    Raises:
        ValueError: The scales or the mode do not fit.
    """
    axes = range(X.ndim)
    method = Method("linear" if mode == "bilinear" else mode)
    return resize(X, axes, planned(X, axes, scales, None), method)


@kernel("Resize", since=18)
def Resize_18(
    X: Array,
    roi: Array | None = None,
    scales: Array | None = None,
    sizes: Array | None = None,
    *,
    antialias: int = 0,
    axes: Sequence[int] | None = None,
    coordinate_transformation_mode: str = "half_pixel",
    cubic_coeff_a: float = -0.75,
    exclude_outside: int = 0,
    extrapolation_value: float = 0.0,
    keep_aspect_ratio_policy: str = "stretch",
    mode: str = "nearest",
    nearest_mode: str = "round_prefer_floor",
) -> Array:
    """Return X with the axes (all unless given) scaled by `scales` or to `sizes`.

    Raises:
        ValueError: An input or attribute does not fit; the message says which.
    """
    chosen = positive_axes(axes, X.ndim) if axes else list(range(X.ndim))
    cropping = coordinate_transformation_mode == "tf_crop_and_resize"
    plans = planned(X, chosen, scales, sizes, keep_aspect_ratio_policy, roi if cropping else None)
    method = Method(
        mode,
        coordinate_transformation_mode,
        nearest_mode,
        cubic_coeff_a,
        bool(exclude_outside),
        extrapolation_value,
        bool(antialias),
    )
    return resize(X, chosen, plans, method)


_LATER = ["antialias", "axes", "keep_aspect_ratio_policy"]
earlier(Resize_18, "Resize", 13, lacks=_LATER)
earlier(Resize_18, "Resize", 11, lacks=_LATER, required=["roi", "scales"])
