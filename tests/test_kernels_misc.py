"""Text, signal, loss and random kernels, against onnxruntime where it computes the same."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kernel_checks import SEEDS, check, floats, quick, words

from onnxslim_lab.kernels import lookup, random_draws, run


@quick
@given(SEEDS)
def test_texts(seed):
    rng = np.random.default_rng(seed)
    check("StringConcat", [words(rng, 2, 3), words(rng, 3)])
    for delimiter in ("", "d"):
        parts = words(rng, 2, 3) + ("e" if delimiter else "")  # "" has no part in onnxruntime, one in Python
        check("StringSplit", [parts], {"delimiter": delimiter, "maxsplit": 1}, outputs=2)
    check("RegexFullMatch", [words(rng, 2, 3)], {"pattern": "[a-d]+"})


@pytest.mark.parametrize(
    ("action", "sensitive", "expected"),
    [
        ("NONE", 1, ["A", "b", "Éa"]),
        ("NONE", 0, ["b", "Éa"]),
        ("UPPER", 0, ["B", "ÉA"]),
        ("LOWER", 1, ["a", "b", "éa"]),
    ],
)
def test_string_normalizer(action, sensitive, expected):
    attributes = {"case_change_action": action, "is_case_sensitive": sensitive, "stopwords": ["a"]}
    found = lookup("StringNormalizer", "", 10)
    x = np.array(["a", "A", "b", "Éa"], object)
    assert run(found, [x], attributes)[0].tolist() == expected
    assert run(found, [x[None]], attributes)[0].tolist() == [expected]
    attributes["stopwords"] = ["a", "A", "b", "Éa"]
    assert run(found, [x], attributes)[0].tolist() == [""]


@quick
@given(SEEDS, st.sampled_from(["TF", "IDF", "TFIDF"]), st.integers(0, 3), st.integers(1, 3), st.booleans())
def test_n_grams(seed, mode, skips, least, named):
    rng = np.random.default_rng(seed)
    pool = [1, 2, 3, 1, 2, 2, 3, 3, 1, 1, 2, 3, 3, 2, 1]
    attributes = {"max_gram_length": 3, "max_skip_count": skips, "min_gram_length": least, "mode": mode}
    attributes |= {"ngram_counts": [0, 3, 9], "ngram_indexes": [1, 0, 2, 3, 4, 6, 5, 7]}
    attributes |= {"weights": rng.random(8).astype(np.float32).tolist()}
    x = rng.integers(1, 4, (3, 9))
    if named:
        attributes["pool_strings"], x = [str(item) for item in pool], x.astype(str).astype(object)
    else:
        attributes["pool_int64s"] = pool
    for given_rows in (x, x[0]):
        check("TfIdfVectorizer", [given_rows], attributes)


@quick
@given(SEEDS, st.integers(0, 1), st.integers(0, 1), st.sampled_from([None, 3, 8]), st.sampled_from([1, 2]))
def test_fourier_transforms(seed, inverse, onesided, length, parts):
    rng = np.random.default_rng(seed)
    x = floats(rng, 2, 5, 6, parts)
    size = None if length is None else np.array(length)
    if inverse and onesided:
        return  # onnxruntime refuses it; the backend tests have it
    if onesided and parts == 2:
        return
    attributes = {"inverse": inverse, "onesided": onesided}
    check("DFT", [x, size], attributes | {"axis": 1}, opset=17, rtol=1e-3, atol=1e-4)
    check("DFT", [x, size, np.array(2)], attributes, opset=20, rtol=1e-3, atol=1e-4)
    signal = floats(rng, 2, 30, 1)
    inputs = [signal, np.array(3), floats(rng, 8), np.array(8)]
    check("STFT", inputs, {"onesided": onesided}, opset=17, rtol=1e-3, atol=1e-4)


def test_windows():
    for op_type in ("HannWindow", "HammingWindow", "BlackmanWindow"):
        for periodic in (0, 1):
            check(op_type, [np.array(9)], {"periodic": periodic}, opset=17, atol=1e-6)
            one = run(lookup(op_type, "", 17), [np.array(1)], {"periodic": periodic})[0]
            assert np.isfinite(one).all()
    numbers = [
        np.array(8),
        np.array(64),
        np.array(8192),
        np.array(100.0, np.float32),
        np.array(4000.0, np.float32),
    ]
    check("MelWeightMatrix", numbers, opset=17)


@quick
@given(SEEDS, st.sampled_from(["none", "sum", "mean"]), st.booleans(), st.sampled_from([None, 1, -1]))
def test_losses(seed, reduction, weighted, ignored):
    rng = np.random.default_rng(seed)
    scores, target = floats(rng, 3, 4, 2), rng.integers(0, 4, (3, 2))
    target[0, 0] = 1 if ignored is None else ignored
    target[1, 0] = 2
    weight = rng.random(4).astype(np.float32) + 0.1 if weighted else None
    attributes = {"reduction": reduction} | ({} if ignored is None else {"ignore_index": ignored})
    check("NegativeLogLikelihoodLoss", [scores, target, weight], attributes, opset=13)
    check("SoftmaxCrossEntropyLoss", [scores, target, weight], attributes, outputs=2, opset=13)


def test_random_numbers():
    random_draws.reseed(1)
    shape = (200, 50)
    like = np.zeros(shape, np.float32)
    (normal,) = run(
        lookup("RandomNormal", "", 22), [], {"shape": shape, "mean": 3.0, "scale": 2.0, "dtype": 11}
    )
    assert normal.shape == shape
    assert normal.dtype == np.float64
    assert abs(normal.mean() - 3) < 0.1
    assert abs(normal.std() - 2) < 0.1
    (uniform,) = run(lookup("RandomUniformLike", "", 22), [like], {"low": -1.0, "high": 3.0})
    assert uniform.dtype == np.float32
    assert uniform.min() >= -1
    assert uniform.max() <= 3
    assert abs(uniform.mean() - 1) < 0.1
    (half,) = run(lookup("RandomNormalLike", "", 22), [like], {"dtype": 10})
    assert half.dtype == np.float16
    (even,) = run(lookup("RandomUniform", "", 1), [], {"shape": [4], "seed": 5.0})
    again = run(lookup("RandomUniform", "", 1), [], {"shape": [4], "seed": 5.0})[0]
    assert even.tolist() == again.tolist()
    assert even.tolist() != run(lookup("RandomUniform", "", 1), [], {"shape": [4]})[0].tolist()
    (coin,) = run(lookup("Bernoulli", "", 22), [like + np.float32(0.3)], {"dtype": 6})
    assert coin.dtype == np.int32
    assert abs(coin.mean() - 0.3) < 0.05
    logits = np.log(np.array([[1, 2, 7], [5, 5, 0.0001]], np.float32))
    (classes,) = run(lookup("Multinomial", "", 7), [logits], {"sample_size": 4000, "dtype": 7})
    assert classes.dtype == np.int64
    shares = np.bincount(classes[0], minlength=3) / 4000
    np.testing.assert_allclose(shares, [0.1, 0.2, 0.7], atol=0.04)
    assert classes[1].max() <= 2
    x = np.ones(shape, np.float32)
    dropped, mask = run(
        lookup("Dropout", "", 22), [x, np.array(0.25, np.float32), np.array(True)], {"seed": 3}
    )
    assert abs(mask.mean() - 0.75) < 0.02
    np.testing.assert_allclose(dropped, mask / 0.75, rtol=1e-6)
    kept, mask = run(lookup("Dropout", "", 10), [x], {})
    assert kept is x
    assert mask.all()
