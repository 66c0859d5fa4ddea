"""Optimal brain surgeon against plain dense reimplementations of its formulas."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxslim_lab.second_order import obs
from onnxslim_lab.second_order.blocked import compensators, prune_blocked, static_scores
from onnxslim_lab.second_order.network import wanted
from onnxslim_lab.second_order.obs import damped, eliminate, eliminate_blocks, output_loss, refit
from onnxslim_lab.second_order.patterns import Pattern, by_pattern, cheapest
from onnxslim_lab.second_order.pruning import _cheapest_of_all
from onnxslim_lab.second_order.repair import Moments
from onnxslim_lab.second_order.threads import in_parallel
from onnxslim_lab.second_order.wide import removed_in_wide
from onnxslim_lab.statistics import Gram


def layer(seed, groups=1, outputs=4, columns=12, rows=60):
    random = np.random.default_rng(seed)
    mixing = random.standard_normal((groups, columns, columns))
    x = random.standard_normal((groups, rows, columns)) @ mixing
    return random.standard_normal((groups, outputs, columns)), x.swapaxes(1, 2) @ x


def plain_surgeon(weights, hessian, steps, allowed=lambda _gone, _q: True):
    """Dense, one weight at a time, the inverse made afresh at every step."""
    weights, left, order, losses = weights.copy(), list(range(len(weights))), [], []
    for _ in range(steps):
        inverse = np.linalg.inv(hessian[np.ix_(left, left)])
        scores = {q: weights[q] ** 2 / inverse[i, i] for i, q in enumerate(left) if allowed(order, q)}
        q = min(scores, key=scores.get)
        i = left.index(q)
        weights[left] -= weights[q] / inverse[i, i] * inverse[:, i]
        weights[q] = 0
        order.append(q)
        losses.append(scores[q])
        left.remove(q)
    return order, losses


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), groups=st.integers(1, 3), columns=st.integers(2, 14))
def test_elimination_is_the_dense_formula(seed, groups, columns):
    weights, gram = layer(seed, groups, 3, columns)
    found = eliminate(weights, gram)
    hessian = damped(gram, 1e-6)
    for group, row in np.ndindex(groups, 3):
        order, losses = plain_surgeon(weights[group, row], hessian[group], columns)
        place = group * 3 + row
        assert found.order[place].tolist() == order
        np.testing.assert_allclose(found.loss[place], losses, rtol=1e-6, atol=1e-9 * max(losses))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), columns=st.integers(3, 14), part=st.floats(0.2, 0.8))
def test_the_weights_left_are_those_of_the_dense_formula(seed, columns, part):
    weights, gram = layer(seed, 1, 3, columns)
    steps, hessian = round(part * columns), damped(gram, 1e-6)[0]
    mask = np.ones(weights.shape, bool)
    np.put_along_axis(mask[0], eliminate(weights, gram, steps=steps).order, False, axis=1)
    found = refit(weights, mask, gram)
    for row in range(3):
        plain, left = weights[0, row].copy(), list(range(columns))
        for _ in range(steps):
            inverse = np.linalg.inv(hessian[np.ix_(left, left)])
            at = int((plain[left] ** 2 / np.diagonal(inverse)).argmin())
            plain[left] -= plain[left[at]] / inverse[at, at] * inverse[:, at]
            plain[left.pop(at)] = 0
        np.testing.assert_allclose(found[0, row], plain, rtol=1e-6, atol=1e-6 * np.abs(plain).max())


def test_elimination_over_several_blocks_of_steps_is_the_dense_formula():
    weights, gram = layer(3, outputs=2, columns=150, rows=400)
    found = eliminate(weights, gram)
    order, losses = plain_surgeon(weights[0, 1], damped(gram, 1e-6)[0], 150)
    assert found.order[1].tolist() == order
    np.testing.assert_allclose(found.loss[1], losses, rtol=1e-6)


@pytest.mark.parametrize(("keep", "group", "columns"), [(2, 4, 12), (1, 4, 10), (2, 3, 7)])
def test_n_of_m_keeps_exactly_n_of_every_group(keep, group, columns):
    weights, gram = layer(1, columns=columns)
    found = eliminate(weights, gram, group=group, keep=keep)

    def allowed(gone, q):
        size = min(group, columns - q // group * group)
        return sum(g // group == q // group for g in gone) < size - keep

    order, losses = plain_surgeon(weights[0, 2], damped(gram, 1e-6)[0], found.order.shape[1], allowed)
    assert found.order[2].tolist() == order
    np.testing.assert_allclose(found.loss[2], losses, rtol=1e-6)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), columns=st.sampled_from([8, 9, 11]))
def test_blocks_of_columns_go_in_the_order_of_the_dense_formula(seed, columns):
    weights, gram = layer(seed, outputs=2, columns=columns)
    found = eliminate_blocks(weights, gram, 4)
    hessian, left, current = damped(gram, 1e-6)[0], list(range(columns)), weights[0, 1].copy()
    for step in range(found.order.shape[1]):
        inverse = np.linalg.inv(hessian[np.ix_(left, left)])
        blocks = {b: [i for i, q in enumerate(left) if q // 4 == b] for b in {q // 4 for q in left}}
        solved = {
            b: np.linalg.solve(inverse[np.ix_(i, i)], current[[left[j] for j in i]])
            for b, i in blocks.items()
        }
        scores = {b: current[[left[j] for j in i]] @ solved[b] for b, i in blocks.items()}
        best = min(scores, key=scores.get)
        assert found.order[1, step] == best
        assert found.loss[1, step] == pytest.approx(scores[best], rel=1e-6)
        current[left] -= inverse[:, blocks[best]] @ solved[best]
        left = [q for q in left if q // 4 != best]


def test_a_columns_without_inputs_costs_nothing_and_goes_first():
    weights, gram = layer(5)
    gram[:, 3] = gram[:, :, 3] = 0
    weights[..., 3] = 1e-9
    found = eliminate(weights, gram)
    assert (found.order[:, 0] == 3).all()
    assert (found.loss[:, 0] < 1e-12).all()


def test_zero_weights_go_first_at_no_cost():
    weights, gram = layer(6)
    weights[0, 0, [2, 7]] = 0
    found = eliminate(weights, gram)
    assert set(found.order[0, :2]) == {2, 7}
    assert (found.loss[0, :2] == 0).all()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), density=st.floats(0.1, 0.9))
def test_refit_is_least_squares_on_the_support(seed, density):
    random = np.random.default_rng(seed)
    x = random.standard_normal((50, 8)) @ random.standard_normal((8, 8))
    weights = random.standard_normal((1, 3, 8))
    mask = random.random((1, 3, 8)) < density
    result = refit(weights, mask, (x.T @ x)[None], damping=1e-12)
    for row in range(3):
        support = mask[0, row]
        assert (result[0, row, ~support] == 0).all()
        wanted = np.linalg.lstsq(x[:, support], x @ weights[0, row], rcond=None)[0]
        np.testing.assert_allclose(x[:, support] @ result[0, row, support], x[:, support] @ wanted, atol=1e-5)


def test_the_loss_of_a_step_is_the_output_error_after_refitting():
    weights, gram = layer(7, outputs=1)
    found = eliminate(weights, gram, damping=1e-12)
    for steps in (1, 4, 9):
        mask = np.ones(weights.shape, bool)
        mask[0, 0, found.order[0, :steps]] = False
        change = refit(weights, mask, gram, damping=1e-12) - weights
        assert output_loss(change, gram)[0, 0] == pytest.approx(found.loss[0, :steps].sum(), rel=1e-6)


def test_thresholds_are_running_maxima_and_infinite_for_what_stays():
    weights, gram = layer(8)
    needed = eliminate(weights, gram, steps=5).thresholds(12)
    assert np.isinf(needed).sum() == 4 * 7
    found = eliminate(weights, gram)
    along = np.take_along_axis(found.thresholds(12), found.order, axis=1)
    assert (np.diff(along, axis=1) >= 0).all()


def test_blocked_pruning_is_the_column_by_column_formula():
    weights, gram = layer(9, columns=300, rows=900, outputs=3)
    matrix, upper = weights[0], compensators(gram[0])
    mask = np.random.default_rng(0).random(matrix.shape) < 0.5
    result, removed = prune_blocked(matrix, upper, lambda s, i: mask[:, i : i + s.shape[1]])
    plain, inverse = matrix.copy(), np.linalg.inv(damped(gram[0], 0.01))
    for column in range(300):  # eliminate the column, then every later column no longer depends on it
        error = np.where(mask[:, column], plain[:, column], 0) / inverse[column, column]
        plain[:, column:] -= np.outer(error, inverse[column, column:])
        plain[mask[:, column], column] = 0
        inverse = inverse - np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    assert (removed == mask).all()
    np.testing.assert_allclose(result, plain, rtol=1e-6, atol=1e-8)
    dropped = np.where(mask, 0, matrix)
    assert (
        output_loss((result - matrix)[None], gram).sum() < output_loss((dropped - matrix)[None], gram).sum()
    )


def test_static_scores_are_the_first_step_of_the_surgeon():
    weights, gram = layer(10)
    found = eliminate(weights, gram, damping=0.01, steps=1)
    scores = static_scores(weights[0], gram[0])
    np.testing.assert_allclose(scores.min(axis=1), found.loss[:, 0], rtol=1e-9)


def test_patterns_are_followed():
    scores = np.arange(10.0)[None, None]
    assert np.isinf(by_pattern(scores, Pattern.parse("2:4"))[0, 0]).tolist() == [0, 0, 1, 1, 0, 0, 1, 1, 1, 1]
    assert by_pattern(scores, Pattern.parse("block:5"))[0, 0].tolist() == [2.0] * 5 + [7.0] * 5
    for text in ("", "4:2", "0:4", "block:1", "block:x"):
        with pytest.raises(ValueError, match="block:N"):
            Pattern.parse(text)


def test_cheapest_takes_ties_in_order_and_never_what_must_stay():
    losses = np.array([[1.0, np.inf, 1.0], [0.0, 1.0, np.inf]])
    assert cheapest(losses, 2).tolist() == [[True, False, False], [True, False, False]]
    assert cheapest(losses, 6).sum() == 4


def test_threads_change_nothing(monkeypatch):
    weights, gram = layer(11, outputs=7, columns=40)
    one = eliminate(weights, gram)
    monkeypatch.setattr(obs, "MEMORY", 1)  # a row at a time
    again = eliminate(weights, gram)
    assert (one.order == again.order).all()
    assert (one.loss == again.loss).all()
    seen = []
    in_parallel(lambda start, stop: seen.append((start, stop)), 7, 3)
    assert sorted(seen) == [(0, 3), (3, 6), (6, 7)]


@pytest.mark.parametrize("biased", [False, True])
def test_what_is_wanted_of_a_layer_is_least_squares_against_the_original(biased):
    random = np.random.default_rng(12)
    before = random.standard_normal((200, 6)) @ random.standard_normal((6, 6)) + 1
    now = (before + 0.3 * random.standard_normal(before.shape)).astype(np.float32).astype(np.float64)
    before = before.astype(np.float32).astype(np.float64)
    matrix, bias = random.standard_normal((1, 3, 6)), random.standard_normal((1, 3))
    x, y = (np.concatenate([rows, np.ones((200, 1))], axis=1) for rows in (now, before))
    found = Moments((x.T @ x)[None], (y.T @ x)[None])
    dense, gram = wanted(matrix, bias if biased else None, found, 1e-12)
    if biased:
        plain = np.linalg.lstsq(x, before @ matrix[0].T + bias[0], rcond=None)[0][:6].T
        centred = now - now.mean(axis=0)
    else:
        plain, centred = np.linalg.lstsq(now, before @ matrix[0].T, rcond=None)[0].T, now
    np.testing.assert_allclose(dense[0], plain, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(gram.xtx[0], centred.T @ centred, rtol=1e-6, atol=1e-6)


def test_wide_layers_lose_exactly_what_is_asked_for_and_follow_patterns():
    weights, gram = layer(13, groups=2, outputs=3, columns=150, rows=400)
    measured = Gram(gram, np.zeros((2, 150)), 400)
    gone = np.random.default_rng(1).random(weights.shape) < 0.37
    found = removed_in_wide(weights, measured, gone, Pattern.parse("any"), 0.01)
    assert found.sum() == gone.sum()
    for text, keep in (("2:4", 2), ("2:3", 2)):
        pattern = Pattern.parse(text)
        found = removed_in_wide(weights, measured, None, pattern, 0.01)
        full = 150 - 150 % pattern.group
        assert ((~found[..., :full]).reshape(-1, pattern.group).sum(axis=1) == keep).all()


def test_the_cheapest_of_all_layers_are_those_of_all_losses_together():
    random = np.random.default_rng(14)
    losses = [random.integers(0, 9, size).astype(np.float32) for size in ((2, 3, 5), (1, 4, 7), (1, 1, 2))]
    losses[1][0, 0] = np.inf
    together = np.concatenate([one.reshape(-1) for one in losses])
    for fraction in (0.0, 0.3, 0.62, 0.99):
        found = np.concatenate([mask.reshape(-1) for mask in _cheapest_of_all(losses, fraction)])
        assert (found == cheapest(together, round(fraction * together.size))).all()


def test_the_inverse_of_a_gram_matrix_that_rounding_left_indefinite():
    rows = np.random.default_rng(0).normal(size=(8, 60)).astype(np.float32)
    gram = damped((rows.T @ rows).astype(np.float64), 1e-9)[None]
    with pytest.raises(np.linalg.LinAlgError):
        np.linalg.cholesky(gram)
    assert np.isfinite(obs.inverse(gram)).all()
    assert np.linalg.eigvalsh(obs.inverse(gram)).min() > 0
    with pytest.raises(np.linalg.LinAlgError):
        obs.inverse(-np.eye(3)[None])
