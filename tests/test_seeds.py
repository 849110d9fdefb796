"""Boards: training, evaluation and demonstrations never meet.

That those of training never repeat is in test_resume_batch.py.
"""

import pytest

from actfocus_jax import build
from actfocus_jax.config import schema
from actfocus_jax.warmstart import demonstrations
from actfocus_jax.warmstart import model as warm_model

MANY = 100_000  # steps; the paper takes 200


class Enough(Exception):
  """Nothing more is wanted."""


def demonstrated(tmp_path, monkeypatch, seed):
  """The boards of the tokenizer and those of the model."""
  c = schema.defaults()
  c.warm_start.update(cache=str(tmp_path), seed=seed)
  asked, play = [], demonstrations.play

  def note(chat, cast, seeds, **kwargs):
    asked.append(seeds)
    if len(asked) == 2:
      raise Enough
    return play(chat, cast, seeds[:2], **kwargs)

  with monkeypatch.context() as patch, pytest.raises(Enough):
    patch.setattr(demonstrations, 'play', note)
    warm_model.make(build.warm_start(c), tmp_path / 'none')
  assert len(asked[1]) == c.warm_start.episodes and len(asked[0]) >= 32
  return asked


def test_demonstrations_have_boards_of_their_own(tmp_path, monkeypatch):
  first = demonstrated(tmp_path, monkeypatch, seed=0)
  second = demonstrated(tmp_path, monkeypatch, seed=1)
  latest = schema.FIRST_TRAINING_SEED + MANY * 8
  for seeds in (*first, *second):
    assert seeds.start > latest > schema.FIRST_TRAINING_SEED
  together = [*first, *second]
  assert len(set().union(*together)) == sum(len(seeds) for seeds in together)
