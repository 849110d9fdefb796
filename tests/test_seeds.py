"""Boards: training, evaluation and demonstrations never meet."""

import pytest

from actfocus_jax import assemble, base_model, loop
from actfocus_jax.agent import demonstrations
from actfocus_jax.run import settings

MANY = 100_000  # steps; the paper takes 200


def test_training_boards_are_counted_on():
  assert loop.training_seeds(0, 8) == range(10_000, 10_008)
  assert loop.training_seeds(3, 8) == range(10_024, 10_032)
  assert loop.training_seeds(1, 5) == range(10_005, 10_010)


@pytest.mark.parametrize('prompts', [1, 8, 16])
def test_training_boards_never_repeat(prompts):
  seeds = [s for k in range(300) for s in loop.training_seeds(k, prompts)]
  assert len(set(seeds)) == len(seeds) == 300 * prompts
  # Where those of evaluation have to end, as `checks` says.
  assert min(seeds) == settings.FIRST_TRAINING_SEED == 10_000


class Enough(Exception):
  """Nothing more is wanted."""


def demonstrated(tmp_path, monkeypatch, seed):
  """The boards of the tokenizer and those of the model."""
  c = settings.defaults()
  c.warm_start.update(cache=str(tmp_path), seed=seed)
  asked, play = [], demonstrations.play

  def note(chat, cast, seeds, **kwargs):
    asked.append(seeds)
    if len(asked) == 2:
      raise Enough
    return play(chat, cast, seeds[:2], **kwargs)

  with monkeypatch.context() as patch, pytest.raises(Enough):
    patch.setattr(demonstrations, 'play', note)
    base_model.make(assemble.warm_start(c), None, tmp_path / 'none')
  assert len(asked[1]) == c.warm_start.episodes and len(asked[0]) >= 32
  return asked


def test_demonstrations_have_boards_of_their_own(tmp_path, monkeypatch):
  first = demonstrated(tmp_path, monkeypatch, seed=0)
  second = demonstrated(tmp_path, monkeypatch, seed=1)
  longest = settings.defaults().rollout.prompts
  latest = loop.training_seeds(MANY, longest).stop
  for seeds in (*first, *second):
    assert seeds.start > latest > settings.FIRST_TRAINING_SEED
  together = [*first, *second]
  assert len(set().union(*together)) == sum(len(seeds) for seeds in together)
