"""How much the KL divergences of units must count for a network to become so much smaller."""

# By when the budget is to be met, as a share of the epochs: the rest is for what is left to learn.
_MET_AFTER = 0.7


def kl_factor(share: float, budget: float, progress: float) -> float:
    """What to multiply the KL weight with, by how far the network is from where it should be.

    It should shrink by the same factor in every epoch until the budget is met.

    Args:
      share: of the dense network's multiply-adds that is left.
      budget: the share that is to be left in the end.
      progress: how much of the training is done, 0 to 1.

    Example:
      >>> from experiments import budget
      >>> [round(budget.kl_factor(share, 0.1, 0.7), 2) for share in (0.4, 0.1, 0.05)]
      [16.0, 1.0, 0.25]
    """
    wanted = budget ** min(1.0, progress / _MET_AFTER)
    return (share / wanted) ** 2
