"""Success rates with 95 % intervals.

They assume independent episodes. Episodes of one group share a board, so the
true spread of a success rate is somewhat wider.
"""

import math

Z95 = 1.959963984540054


def wilson(successes: float, n: float) -> tuple[float, float]:
  """Score interval of a proportion, in [0, 1]; (0, 1) without trials.

      (p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)

  Source: Wilson, "Probable inference, the law of succession, and statistical
  inference", JASA 22 (1927).

  Raises:
    ValueError: successes is not in [0, n].
  """
  if not 0 <= successes <= n:
    raise ValueError(f'{successes} successes of {n} trials')
  if n == 0:
    return 0.0, 1.0
  p, z = successes / n, Z95
  center = p + z**2 / (2 * n)
  half = z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
  scale = 1 + z**2 / n
  # Exactly 0 and 1 at the ends; rounding would give 1e-17.
  low = 0.0 if successes == 0 else (center - half) / scale
  high = 1.0 if successes == n else (center + half) / scale
  return low, high


def newcombe(
  successes_a: float, n_a: float, successes_b: float, n_b: float
) -> tuple[float, float, float]:
  """Difference of two proportions, a minus b, low and high end.

      low  = d - sqrt((p_a - l_a)^2 + (u_b - p_b)^2)
      high = d + sqrt((u_a - p_a)^2 + (p_b - l_b)^2)

  where (l, u) are the two Wilson intervals. Source: Newcombe, "Interval
  estimation for the difference between independent proportions", Statistics in
  Medicine 17 (1998), method 10.

  Raises:
    ValueError: no trials, or successes outside of them.
  """
  if not (n_a and n_b):
    raise ValueError(f'no trials: {n_a} and {n_b}')
  low_a, high_a = wilson(successes_a, n_a)
  low_b, high_b = wilson(successes_b, n_b)
  p_a, p_b = successes_a / n_a, successes_b / n_b
  difference = p_a - p_b
  down = math.hypot(p_a - low_a, high_b - p_b)
  up = math.hypot(high_a - p_a, p_b - low_b)
  return difference, difference - down, difference + up
