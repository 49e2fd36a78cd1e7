"""How evenly tenants were served, as a number between 0 and 1. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def jain(values: Sequence[float]) -> float:
    """Jain's index: 1 if all are the same, 1/n if one has everything, 1 for none at all.

    "A quantitative measure of fairness and discrimination" (Jain, Chiu and Hawe, 1984).
    """
    squares = sum(value * value for value in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else 1.0


def fair_shares(demands: Mapping[str, float], total: float) -> dict[str, float]:
    """What each would have of `total` if it were shared out max-min fairly.

    Nobody gets more than it demands, and what the modest leave over goes to the others in equal parts.
    """
    shares: dict[str, float] = {}
    left = min(total, sum(demands.values()))
    for number, (name, demand) in enumerate(sorted(demands.items(), key=lambda item: (item[1], item[0]))):
        shares[name] = min(demand, left / (len(demands) - number))
        left -= shares[name]
    return shares


def fairness(demands: Mapping[str, float], served: Mapping[str, float]) -> float:
    """Jain's index over what each was served as a part of its fair share of all service.

    So it is 1 also when tenants that ask for little get little, and falls when somebody who asked for
    much got it at the cost of others.
    """
    shares = fair_shares(demands, sum(served.values()))
    return jain([served.get(name, 0.0) / share for name, share in shares.items() if share])
