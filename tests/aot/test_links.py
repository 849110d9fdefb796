"""Which links and how many hops join the chips of a slice."""

import numpy as np
import pytest

from actfocus_jax.aot import links


@pytest.mark.parametrize(
  ('sizes', 'places', 'share', 'hops'),
  [
    ((4, 4), [(0, 0)], 1, 0),
    # Neighbours share one link of four; so do the ends of an open line.
    ((4, 4), [(0, 0), (0, 1)], 1 / 4, 1),
    ((4, 4), [(0, y) for y in range(4)], 1 / 4, 3),
    ((4, 4), [(0, 0), (0, 1), (1, 0), (1, 1)], 2 / 4, 2),
    # The pod's lines of 16 are rings: both links, half way around.
    ((8, 16), [(0, y) for y in range(16)], 2 / 4, 8),
    ((8, 16), [(0, y) for y in range(8)], 1 / 4, 7),
    ((8, 16), [(x, 0) for x in range(8)], 1 / 4, 7),
    ((16, 16), [(x, y) for x in range(16) for y in range(16)], 1, 16),
    # In three dimensions those of whole cubes.
    ((4, 4, 4), [(0, 0, z) for z in range(4)], 2 / 6, 2),
    ((2, 4, 4), [(0, 0, z) for z in range(4)], 1 / 6, 3),
    ((2, 2, 1), [(0, 0, 0), (0, 1, 0)], 1 / 6, 1),
    # On a ring the two ends are neighbours, and every second of it is near.
    ((16, 16), [(0, 0), (0, 15)], 1 / 4, 1),
    ((16, 16), [(0, y) for y in range(0, 16, 2)], 1 / 4, 8),
  ],
)
def test_a_group_uses_the_links_between_its_chips(sizes, places, share, hops):
  found = links.Torus(sizes).span(np.array(places))
  assert found == (pytest.approx(share), hops)


@pytest.mark.parametrize(
  ('sizes', 'axes', 'expected'),
  [
    ((4, 4), (1, 4, 4), [(1, 0), (1 / 4, 3), (1 / 4, 3)]),
    # Two whole dimensions make 4, and what is left of the third is a line.
    ((2, 2, 4), (4, 1, 4), [(1 / 6, 3), (1, 0), (2 / 6, 2)]),
    # 2 x 4 of 4 x 4; a line of two is left.
    ((4, 4), (2, 1, 8), [(1 / 4, 1), (1, 0), (2 / 4, 4)]),
    ((16, 16), (16, 8, 2), [(2 / 4, 8), (1 / 4, 7), (1 / 4, 1)]),
  ],
)
def test_axes_of_a_mesh_lie_in_whole_dimensions_first(sizes, axes, expected):
  found = links.Torus(sizes).spans(axes)
  assert found == [(pytest.approx(share), hops) for share, hops in expected]
