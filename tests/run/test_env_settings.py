"""What a config says of environments: one, one's own, several."""

import json
import sys
import types

import pytest

from actfocus_jax import errors
from actfocus_jax.config import env_schema, resume, schema, validate

BOTH = {'frozen_lake': 1.0, 'sokoban': 3.0}


class Own:
  def __init__(self, *, depth=3, name='x'):
    pass


class Sharing:
  def __init__(self, *, share=0.5):
    pass


@pytest.fixture(autouse=True)
def own_module(monkeypatch):
  module = types.ModuleType('own_games')
  module.Own = Own
  module.Sharing = Sharing
  monkeypatch.setitem(sys.modules, 'own_games', module)


def test_one_environment_is_one_section():
  c = schema.defaults('sokoban')
  (section,) = env_schema.sections(c)
  assert (section.field, section.label) == ('env', 'sokoban')
  assert section.options.to_dict() == env_schema.OPTIONS['sokoban']
  limits = (section.turns, section.max_actions, section.action_budget)
  assert limits == (5, 2, 10) and section.share == 1.0
  assert not c.mixture and env_schema.most_turns(c) == 5


def test_a_mixture_has_a_section_for_each():
  c = schema.defaults(BOTH)
  c.mixture.sokoban.turns = 7
  lake, sokoban = env_schema.sections(c)
  assert (lake.name, sokoban.name) == tuple(BOTH)
  assert (lake.share, sokoban.share) == (1.0, 3.0)
  assert (lake.turns, sokoban.turns) == (5, 7)
  assert env_schema.most_turns(c) == 7
  assert sokoban.player_field == 'mixture.sokoban.player'
  validate.check(c)


def test_an_own_class_has_its_keywords_as_options():
  c = schema.defaults('own_games:Own')
  assert c.env.options.to_dict() == {'depth': 3, 'name': 'x'}
  assert c.player.name == 'random'
  (section,) = env_schema.sections(c)
  assert section.label == 'own'
  validate.check(c)


SHARING = {'sokoban': 1.0, 'own_games:Sharing': 2.0}


@pytest.mark.parametrize('env', ['sokoban', 'own_games:Own', BOTH, SHARING])
def test_a_config_comes_back_from_json(env):
  c = schema.defaults(env)
  for section in env_schema.sections(c):
    assert section.boards == ''
  flat = json.loads(json.dumps(schema.to_json(c)))
  assert schema.to_json(schema.from_json(flat)) == schema.to_json(c)
  assert resume.difference(flat, c) is None


@pytest.mark.parametrize(
  ('env', 'field', 'value', 'words'),
  [
    ('sokoban', 'env.options.rows', 2, '3 to 32'),
    ('sokoban', 'limits.turns', 0, '1 or more'),
    ('sudoku', 'env.options.blanks', 17, 'more than the 16 actions'),
    ('sokoban', 'env.threads', -1, '0 or more'),
    ('sokoban', 'env.time_limit', 2.0, 'env.threads 1 or more'),
    (BOTH, 'mixture.sokoban.options.rows', 2, '3 to 32'),
    (BOTH, 'mixture.sokoban.player.options.skill', 2.0, '0 to 1'),
    (BOTH, 'mixture.sokoban.share', 0.0, 'above 0'),
    (BOTH, 'mixture.sokoban.action_budget', 0, '1 or more'),
    (BOTH, 'limits.turns', 7, 'each environment of a mixture has its own'),
  ],
)
def test_bad_values_are_refused(env, field, value, words):
  c = schema.defaults(env)
  section, _, name = field.rpartition('.')
  schema.get(c, section)[name] = value
  with pytest.raises(errors.UsageError) as error:
    validate.check(c)
  assert str(error.value).startswith(f'{field} is {value!r}')
  assert words in str(error.value)


@pytest.mark.parametrize(
  'env', ['chess', 'own_games:Other', 'no.module:Own', {'chess': 1.0}]
)
def test_unknown_environments_are_refused(env):
  with pytest.raises(errors.UsageError, match='env.name is'):
    schema.defaults(env)


def test_unknown_field_of_a_mixture_is_refused():
  c = schema.defaults(BOTH)
  c.mixture.sokoban.rows = 6
  with pytest.raises(
    errors.UsageError, match='mixture.sokoban.rows is no field'
  ):
    validate.check(c)


def test_two_of_one_label_are_refused():
  with pytest.raises(
    errors.UsageError, match='same label in a mixture, sokoba'
  ):
    schema.defaults({'sokoban': 1.0, 'other:Sokoban': 1.0})


def test_options_of_sudoku_and_a_file_of_boards(tmp_path):
  c = schema.defaults('sudoku')
  c.env.options.size = 5
  with pytest.raises(
    errors.UsageError, match='options.size is 5; allowed: 4, 9'
  ):
    validate.check(c)
  c = schema.defaults('sokoban')
  c.env.boards = str(tmp_path / 'none')
  with pytest.raises(
    errors.UsageError, match='env.boards is .* no file; allow'
  ):
    validate.check(c)
