"""Fourier transforms, windows and the mel filter bank; complex numbers have their two parts last."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from onnxslim_lab.kernels.dtypes import HALF, dtype_of_number
from onnxslim_lab.kernels.registry import Array, kernel


def transform(input: Array, length: int | None, axis: int, *, inverse: bool, onesided: bool) -> Array:
    """Return the discrete Fourier transform of (..., 1) or (..., 2) along an axis.

    Args:
        input: Real numbers (last axis 1) or complex ones (last axis 2: real and imaginary part).
        length: Length of the signal: cut or filled up with zeros; by default that of the axis.
        axis: Not the last one.
        inverse: Transform back, divided by the length.
        onesided: Forward, keep the first length // 2 + 1 frequencies; back, take such and return reals.

    Raises:
        ValueError: The last axis or `axis` does not fit.
    """
    chosen = axis + input.ndim if axis < 0 else axis
    if input.shape[-1] not in {1, 2} or not 0 <= chosen < input.ndim - 1:
        raise ValueError(f"DFT: axis {axis} of an input {input.shape}; the last one holds 1 or 2 parts")
    source = input.astype(np.float32) if input.dtype in HALF else input
    signal = source[..., 0] if input.shape[-1] == 1 else source[..., 0] + 1j * source[..., 1]
    if inverse and onesided:
        count = 2 * (signal.shape[chosen] - 1) if length is None else length
        return np.fft.irfft(signal, count, chosen)[..., None].astype(input.dtype)
    if inverse:
        result = np.fft.ifft(signal, length, chosen)
    elif onesided and input.shape[-1] == 1:
        result = np.fft.rfft(signal, length, chosen)
    else:
        result = np.fft.fft(signal, length, chosen)
        if onesided:
            kept = result.shape[chosen] // 2 + 1
            result = np.moveaxis(np.moveaxis(result, chosen, 0)[:kept], 0, chosen)
    return np.stack((result.real, result.imag), -1).astype(input.dtype)


def number(value: Array | None) -> int | None:
    """Return the integer in a tensor of one element."""
    return None if value is None else int(value.reshape(()))


@kernel("DFT", since=17)
def DFT_17(
    input: Array, dft_length: Array | None = None, *, axis: int = 1, inverse: int = 0, onesided: int = 0
) -> Array:
    """Return the discrete Fourier transform along `axis`."""
    return transform(input, number(dft_length), axis, inverse=bool(inverse), onesided=bool(onesided))


@kernel("DFT", since=20)
def DFT_20(
    input: Array,
    dft_length: Array | None = None,
    axis: Array | None = None,
    *,
    inverse: int = 0,
    onesided: int = 0,
) -> Array:
    """Return the discrete Fourier transform along the axis of the third input, the last signal axis else."""
    chosen = number(axis)
    chosen = -2 if chosen is None else chosen
    return transform(input, number(dft_length), chosen, inverse=bool(inverse), onesided=bool(onesided))


def frames(signal_length: int, frame_length: int, step: int) -> int:
    """Return how many frames a signal has.

    Raises:
        ValueError: The frame does not fit, or the step is not positive.
    """
    if step <= 0 or not 0 < frame_length <= signal_length:
        raise ValueError(f"STFT: frames of {frame_length} every {step} in a signal of {signal_length}")
    return (signal_length - frame_length) // step + 1


@kernel("STFT", since=17)
def STFT(
    signal: Array,
    frame_step: Array,
    window: Array | None = None,
    frame_length: Array | None = None,
    *,
    onesided: int = 1,
) -> Array:
    """Return the transforms of windowed frames: (N, L, 1 or 2) -> (N, frames, frequencies, 2)."""
    if signal.ndim == 2:
        signal = signal[..., None]
    length = number(frame_length)
    if length is None:
        length = signal.shape[1] if window is None else window.shape[0]
    step = number(frame_step) or 0
    count = frames(signal.shape[1], length, step)
    places = np.arange(count)[:, None] * step + np.arange(length)
    framed = signal[:, places]
    if window is not None:
        framed = framed * window.astype(signal.dtype)[:, None]
    return transform(framed, length, 2, inverse=False, onesided=bool(onesided))


def cosine_window(size: Array, weights: Sequence[float], output_datatype: int, periodic: int) -> Array:
    """Return the sum of weights[k] * cos(2 pi k n / N): N is the size, less one unless periodic."""
    count = int(size.reshape(()))
    period = count if periodic else count - 1
    angle = 2 * math.pi * np.arange(count) / max(period, 1)
    total = sum((weight * np.cos(k * angle) for k, weight in enumerate(weights)), np.zeros(count))
    return np.asarray(total).astype(dtype_of_number(output_datatype))


@kernel("HannWindow", since=17)
def HannWindow(size: Array, *, output_datatype: int = 1, periodic: int = 1) -> Array:
    """Return the Hann window."""
    return cosine_window(size, (0.5, -0.5), output_datatype, periodic)


@kernel("HammingWindow", since=17)
def HammingWindow(size: Array, *, output_datatype: int = 1, periodic: int = 1) -> Array:
    """Return the Hamming window, whose first weight the specification has as 25 / 46."""
    return cosine_window(size, (25 / 46, -21 / 46), output_datatype, periodic)


@kernel("BlackmanWindow", since=17)
def BlackmanWindow(size: Array, *, output_datatype: int = 1, periodic: int = 1) -> Array:
    """Return the Blackman window."""
    return cosine_window(size, (0.42, -0.5, 0.08), output_datatype, periodic)


@kernel("MelWeightMatrix", since=17)
def MelWeightMatrix(
    num_mel_bins: Array,
    dft_length: Array,
    sample_rate: Array,
    lower_edge_hertz: Array,
    upper_edge_hertz: Array,
    *,
    output_datatype: int = 1,
) -> Array:
    """Return triangular filters evenly spread on the mel scale: (dft_length // 2 + 1, num_mel_bins)."""
    count, length = int(num_mel_bins.reshape(())), int(dft_length.reshape(()))
    edges = [float(edge.reshape(())) for edge in (lower_edge_hertz, upper_edge_hertz)]
    low, high = (2595 * math.log10(1 + edge / 700) for edge in edges)
    mel = low + np.arange(count + 2) * ((high - low) / (count + 2))
    hertz = 700 * (10 ** (mel / 2595) - 1)
    bins = ((length + 1) * hertz // int(sample_rate.reshape(()))).astype(np.int64)
    left, centre, right = bins[:-2], bins[1:-1], bins[2:]
    place = np.arange(length // 2 + 1)[:, None]
    rising = np.where(place <= centre, (place - left) / np.maximum(centre - left, 1), 0)
    rising = np.where(left == centre, place == centre, np.where(place >= left, rising, 0))
    falling = (place >= centre) & (place < right)
    slope = (right - place) / np.maximum(right - centre, 1)
    return np.asarray(np.where(falling, slope, rising)).astype(dtype_of_number(output_datatype))
