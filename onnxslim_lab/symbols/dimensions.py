"""Integer expressions over the sizes of dynamic axes: polynomials with a canonical form.

A `Size` is an int or an `Expression`, a polynomial with integer coefficients over atoms. An atom is a
symbol (the size of a dynamic axis, or an integer the model computes from data) or a quotient, remainder,
minimum or maximum that the polynomial form cannot express. Equal expressions are equal for every value
of the symbols; different symbols are never assumed equal, and an axis may have size 0.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

# Larger polynomials become one opaque atom, so that hostile chains of products stay cheap.
MOST_TERMS = 16
MOST_DEGREE = 16
LARGEST_FACTOR = 2**63 - 1
LONGEST_TEXT = 256


@dataclass(frozen=True)
class Atom:
    """A quantity that is not expanded further.

    Attributes:
        text: What it is; equal texts are the same quantity.
        low: A lower bound, None when it may be anything.
        least_of: The two sizes of which it is the smaller one, if it is a minimum.
    """

    text: str
    low: int | None
    least_of: tuple[Size, Size] | None = None


Monomial = tuple[Atom, ...]  # sorted by text; the empty one is the constant


@dataclass(frozen=True)
class Expression:
    """A polynomial that is not a plain integer; make it with the functions of this module.

    >>> n, s = symbol("n"), symbol("s")
    >>> str(add(multiply(n, s), 3)), subtract(multiply(n, s), multiply(s, n))
    ('n*s + 3', 0)
    """

    terms: tuple[tuple[Monomial, int], ...]

    def __str__(self) -> str:
        parts = []
        for atoms, factor in self.terms:
            names = [atom.text for atom in atoms]
            parts.append("*".join(([str(factor)] if factor != 1 or not names else []) + names))
        return " + ".join(parts)


Size = int | Expression


def symbol(name: str, low: int | None = 0, least_of: tuple[Size, Size] | None = None) -> Expression:
    """Return the symbol of this name; axis sizes are at least 0, integers from data may be anything."""
    if len(name) > LONGEST_TEXT:
        name = f"#{hashlib.sha256(name.encode('utf-8', 'surrogatepass')).hexdigest()}"
    return Expression((((Atom(name, low, least_of),), 1),))


def _terms(value: Size) -> Mapping[Monomial, int]:
    if isinstance(value, int):
        return {(): value} if value else {}
    return dict(value.terms)


def _order(item: tuple[Monomial, int]) -> tuple[int, list[str]]:
    return -len(item[0]), [atom.text for atom in item[0]]


def _make(terms: Mapping[Monomial, int]) -> Size:
    kept = [(atoms, factor) for atoms, factor in terms.items() if factor]
    if not kept:
        return 0
    if len(kept) == 1 and not kept[0][0]:
        return kept[0][1]
    expression = Expression(tuple(sorted(kept, key=_order)))
    small = len(kept) <= MOST_TERMS and all(
        len(atoms) <= MOST_DEGREE and abs(factor) <= LARGEST_FACTOR for atoms, factor in kept
    )
    return expression if small else symbol(f"({expression})", low_of(expression))


def add(first: Size, second: Size) -> Size:
    """Return first + second."""
    if isinstance(first, int) and isinstance(second, int):
        return first + second
    total = dict(_terms(first))
    for atoms, factor in _terms(second).items():
        total[atoms] = total.get(atoms, 0) + factor
    return _make(total)


def multiply(first: Size, second: Size) -> Size:
    """Return first * second."""
    if isinstance(first, int) and isinstance(second, int):
        return first * second
    total: dict[Monomial, int] = {}
    for left, left_factor in _terms(first).items():
        for right, right_factor in _terms(second).items():
            atoms = tuple(sorted((*left, *right), key=lambda atom: atom.text))
            total[atoms] = total.get(atoms, 0) + left_factor * right_factor
    return _make(total)


def subtract(first: Size, second: Size) -> Size:
    """Return first - second."""
    return add(first, multiply(second, -1))


def product(values: Iterable[Size]) -> Size:
    """Return the product of all values, 1 for none."""
    result: Size = 1
    for value in values:
        result = multiply(result, value)
    return result


def low_of(value: Size) -> int | None:
    """Return a lower bound of the value, None when there is none to be seen.

    >>> low_of(add(multiply(symbol("n"), 2), -1)), low_of(multiply(symbol("n"), -1))
    (-1, None)
    """
    if isinstance(value, int):
        return value
    total = 0
    for atoms, factor in value.terms:
        least = factor
        for atom in atoms:
            if factor < 0 or atom.low is None or atom.low < 0 < len(atoms) - 1:
                return None
            least *= atom.low
        total += least
    return total


def equal(first: Size, second: Size) -> bool | None:
    """Return whether the two are equal whatever the symbols are; None when that depends on them.

    >>> n = symbol("n")
    >>> equal(n, symbol("m")), equal(n, 0), equal(n, -1), equal(add(n, 1), add(1, n))
    (None, None, False, True)
    """
    if first == second:
        return True
    return False if less(first, second) or less(second, first) else None


def less(first: Size, second: Size) -> bool | None:
    """Return whether first < second whatever the symbols are; None when that depends on them."""
    above = low_of(subtract(second, first))
    if above is not None and above > 0:
        return True
    below = low_of(subtract(first, second))
    if below is not None and below >= 0:
        return False
    return None


def exact_quotient(first: Size, second: Size) -> Size | None:
    """Return first / second where that is a polynomial, else None. A zero divisor is taken not to occur.

    >>> n = symbol("n")
    >>> str(exact_quotient(multiply(n, 12), multiply(n, 3))), exact_quotient(n, 2)
    ('4', None)
    """
    divisor = list(_terms(second).items())
    if len(divisor) != 1:
        return 1 if first == second and divisor else None
    atoms, factor = divisor[0]
    result: dict[Monomial, int] = {}
    for own, own_factor in _terms(first).items():
        rest = list(own)
        for atom in atoms:
            if atom not in rest:
                return None
            rest.remove(atom)
        if own_factor % factor:
            return None
        result[tuple(rest)] = own_factor // factor
    return _make(result)


def floor_divide(first: Size, second: Size) -> Size:
    """Return floor(first / second); the divisor is not zero.

    >>> str(floor_divide(add(multiply(symbol("n"), 4), 3), 2))
    '2*n + 1'
    """
    if isinstance(first, int) and isinstance(second, int):
        return first // second
    whole = exact_quotient(first, second)
    if whole is not None:
        return whole
    if isinstance(second, int):
        quotient = _make({atoms: factor // second for atoms, factor in _terms(first).items()})
        rest = subtract(first, multiply(quotient, second))
        if isinstance(rest, int):
            return quotient
        least = low_of(rest) if second > 0 else None
        return add(quotient, symbol(f"floor(({rest})/{second})", None if least is None else least // second))
    least, divisor = low_of(first), low_of(second)
    positive = least is not None and least >= 0 and divisor is not None and divisor >= 0
    return symbol(f"floor(({first})/({second}))", 0 if positive else None)


def truncate_divide(first: Size, second: Size) -> Size:
    """Return first / second rounded towards zero, as ONNX's Div does on integers; the divisor is not zero."""
    if isinstance(first, int) and isinstance(second, int):
        quotient = abs(first) // abs(second)
        return quotient if (first < 0) == (second < 0) else -quotient
    whole = exact_quotient(first, second)
    if whole is not None:
        return whole
    least, divisor = low_of(first), low_of(second)
    if least is not None and least >= 0 and divisor is not None and divisor >= 0:
        return floor_divide(first, second)
    return symbol(f"trunc(({first})/({second}))", None)


def modulo(first: Size, second: Size) -> Size:
    """Return the remainder with the sign of the divisor, as ONNX's Mod does; the divisor is not zero."""
    if isinstance(first, int) and isinstance(second, int):
        return first % second
    if exact_quotient(first, second) is not None:
        return 0
    positive = (low_of(second) or 0) > 0
    return symbol(f"mod({first}, {second})", 0 if positive else None)


def minimum(first: Size, second: Size) -> Size:
    """Return the smaller of the two."""
    lesser = less(first, second)
    if lesser is not None:
        return first if lesser else second
    if less(second, first) is not None:
        return first if not less(second, first) else second
    bounds = low_of(first), low_of(second)
    low = None if None in bounds else min(bound for bound in bounds if bound is not None)
    return symbol(f"min({', '.join(sorted((str(first), str(second))))})", low, (first, second))


def smaller_of(value: Size) -> tuple[Size, Size] | None:
    """Return the two sizes whose minimum this is, None when it is something else.

    >>> [str(size) for size in smaller_of(minimum(symbol("n"), 512)) or ()]
    ['n', '512']
    """
    if isinstance(value, Expression) and len(value.terms) == 1 and value.terms[0][1] == 1:
        atoms = value.terms[0][0]
        return atoms[0].least_of if len(atoms) == 1 else None
    return None


def maximum(first: Size, second: Size) -> Size:
    """Return the larger of the two.

    >>> str(maximum(symbol("n"), 0)), str(maximum(symbol("n"), 1))
    ('n', 'max(1, n)')
    """
    lesser = less(first, second)
    if lesser is not None:
        return second if lesser else first
    if less(second, first) is not None:
        return second if not less(second, first) else first
    bounds = [bound for bound in (low_of(first), low_of(second)) if bound is not None]
    return symbol(f"max({', '.join(sorted((str(first), str(second))))})", max(bounds, default=None))


def evaluate(value: Size, symbols: Mapping[str, int]) -> int:
    """Return the value of a polynomial whose atoms are all among the given symbols (for tests and messages).

    >>> evaluate(add(multiply(symbol("n"), 2), 1), {"n": 3})
    7
    """
    total = 0
    for atoms, factor in _terms(value).items():
        for atom in atoms:
            factor *= symbols[atom.text]  # noqa: PLW2901 - the product is built in place
        total += factor
    return total
