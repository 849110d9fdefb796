"""Plots: sizes, lines and labels."""

import matplotlib.image
import numpy as np
import pytest
from matplotlib import figure

from actfocus_jax.report import plots

EVALS = [
  {'step': 0, 'success': 0.3, 'success_low': 0.2, 'success_high': 0.4},
  {'step': 10, 'success': 0.5, 'success_low': 0.4, 'success_high': 0.6},
]
STEPS = [
  {
    'step': step,
    'train/success': step / 20,
    'weights/action_share': 0.1,
    'weights/action_mass': 0.5,
    'signal/mean': -8.0,
    'signal/std': 1.0,
  }
  for step in range(10)
]


@pytest.fixture
def drawn(monkeypatch):
  """Figures drawn in a test."""
  figures = []
  original = figure.Figure.__init__

  def init(self, *args, **kwargs):
    original(self, *args, **kwargs)
    figures.append(self)

  monkeypatch.setattr(figure.Figure, '__init__', init)
  return figures


def texts(axes):
  return {text.get_text() for text in axes.texts}


def size(path):
  height, width = matplotlib.image.imread(path).shape[:2]
  return width, height


def test_learning_curve_has_three_panels_with_labels(drawn, tmp_path):
  path = tmp_path / 'report' / 'curve.png'
  plots.learning_curve(
    EVALS, STEPS, random_success=0.24, warm_start_success=0.3, path=path
  )
  assert size(path) == (1800, 1280)
  success, weight, signal = drawn[0].axes
  assert texts(success) == {
    'held out 50%', 'training 45%', 'random play 24%', 'warm start 30%',
  }  # fmt: skip
  assert texts(weight) == {'in count 10%', 'in weight 50%'}
  assert texts(signal) == {'mean -8\n± 1 std'}
  curve = success.lines[0]
  np.testing.assert_array_equal(curve.get_xydata(), [[0, 0.3], [10, 0.5]])
  band = success.collections[0].get_paths()[0].get_extents()
  np.testing.assert_allclose(band.extents, [0, 0.2, 10, 0.6])
  levels = sorted(line.get_ydata()[0] for line in success.lines[2:])
  assert levels == [0.24, 0.3]
  assert success.get_ylim()[1] > 0.6


@pytest.mark.parametrize('evals', [[], EVALS[:1]])
def test_learning_curve_of_a_run_that_has_just_begun(drawn, tmp_path, evals):
  path = tmp_path / 'curve.png'
  steps = [{'step': 0, 'train/success': None, 'signal/mean': None}]
  plots.learning_curve(evals, steps, random_success=0.0, path=path)
  assert size(path) == (1800, 840)
  (axes,) = drawn[0].axes
  assert 'random play 0%' in texts(axes)
  assert not any('warm start' in text for text in texts(axes))


def test_overlay_labels_every_run(drawn, tmp_path):
  path = tmp_path / 'curves.png'
  other = [row | {'success': 0.45} for row in EVALS]
  plots.overlay([('a', EVALS), ('b', other)], random_success=0.2, path=path)
  assert size(path) == (1800, 920)
  (axes,) = drawn[0].axes
  assert texts(axes) == {'a 50%', 'b 45%', 'random play 20%'}
  colors = {line.get_color() for line in axes.lines}
  assert len(colors) == 3


@pytest.mark.parametrize('window', [1, 3, 50])
def test_smooth_against_a_loop(window):
  values = np.random.default_rng(0).normal(size=17).tolist()
  expected = []
  for stop in range(1, 18):
    part = values[max(0, stop - window) : stop]
    expected.append(sum(part) / len(part))
  np.testing.assert_allclose(plots.smooth(values, window), expected, rtol=1e-12)


def test_spread_labels_apart_stay():
  wanted = [0.9, 0.1, 0.5]
  np.testing.assert_allclose(plots.spread(wanted, [0.1] * 3), wanted)


def test_spread_by_hand():
  # The two at 0.50 and 0.54 need 0.2 each: 0.42 and 0.62; the second now
  # reaches 0.72, into the one at 0.75, which spans 0.65 to 0.85. All three are
  # 0.6 high around their mean 0.5966667.
  got = plots.spread([0.75, 0.50, 0.54], [0.2] * 3)
  middle = (0.75 + 0.50 + 0.54) / 3
  np.testing.assert_allclose(got, [middle + 0.2, middle - 0.2, middle])


def test_spread_labels_never_overlap():
  random = np.random.default_rng(1)
  for _ in range(50):
    wanted, heights = random.uniform(size=6), random.uniform(0.05, 0.2, size=6)
    places = plots.spread(wanted, heights)
    order = np.argsort(places)
    gaps = np.diff(places[order])
    needed = (heights[order][1:] + heights[order][:-1]) / 2
    assert (gaps >= needed - 1e-12).all()
