"""Rows of the config: what they cover, what they allow, JSON, the page."""

import dataclasses
import inspect
import json
import pathlib
import sys
import types

import pytest

from actfocus_jax import envs, errors
from actfocus_jax.algorithm import estimators
from actfocus_jax.config import fields, resume, schema, validate
from actfocus_jax.warmstart import players

PAGE = pathlib.Path(__file__).resolve().parents[2] / 'configs' / 'README.md'
BOTH = {'frozen_lake': 1.0, 'sokoban': 3.0}


class Own:
  def __init__(self, *, depth=3, name='x'):
    pass


class Plain:
  pass


class Sharing:
  def __init__(self, *, share=0.5):
    pass


@pytest.fixture(autouse=True)
def own_module(monkeypatch):
  module = types.ModuleType('own_games')
  module.Own, module.Sharing, module.Plain = Own, Sharing, Plain
  monkeypatch.setitem(sys.modules, 'own_games', module)


ALL = [*schema.ENVS, 'own_games:Own', BOTH]


@pytest.mark.parametrize('env', ALL, ids=str)
def test_rows_are_the_fields_of_the_defaults(env):
  rows, c = fields.rows(env), schema.defaults(env)
  flat = schema.flatten(c)
  assert flat.keys() == rows.keys()
  validate.check(c)
  for name, row in rows.items():
    assert row.name == name
    assert row.allowed.holds(flat[name]) and row.allowed.text
    assert row.meaning or '.options.' in name
    assert '|' not in row.allowed.text + row.meaning  # cells of a table
    assert flat[name] == row.default


@pytest.mark.parametrize('name', schema.ENVS)
def test_options_are_the_arguments_of_environment_and_players(name):
  c = schema.defaults(name)
  arguments = dict(inspect.signature(envs.ENVS[name]).parameters)
  arguments.pop('progress', None)  # A callable cannot be a field.
  assert c.env.options.to_dict() == {
    option: '' if argument.default is None else argument.default
    for option, argument in arguments.items()
  }
  for player in players.PLAYERS[name].values():
    names = {field.name for field in dataclasses.fields(player)}
    assert names == set(c.player.options)


def test_numbers_of_an_estimator_are_its_defaults():
  for name, estimator in estimators.ESTIMATORS.items():
    assert name in schema.ESTIMATORS_OF[estimator.algo]
    assert schema.defaults().advantage[name].to_dict() == {
      argument.name: argument.default
      for argument in inspect.signature(estimator.compute).parameters.values()
      if argument.default is not argument.empty
    }


@pytest.mark.parametrize(
  ('allowed', 'good', 'bad', 'text'),
  [
    (fields.one_of('a', 'b'), ['a', 'b'], ['c', ''], 'a, b'),
    (fields.at_least(1), [1, 2.5], [0, 0.9], '1 or more'),
    (fields.above(0), [1e-9, 3], [0, -1], 'above 0'),
    (fields.within(0, 1), [0, 0.5, 1], [-0.1, 1.1], '0 to 1'),
    (fields.optional(fields.above(0)), [None, 1], [0], 'None or above 0'),
  ],
)
def test_allowed_values_hold(allowed, good, bad, text):
  assert all(map(allowed.holds, good)) and not any(map(allowed.holds, bad))
  assert allowed.text == text


def test_page_and_help_show_every_row():
  text = PAGE.read_text()
  assert text == schema.page(text), (
    'The tables of configs/README.md are old; to rewrite them: '
    'python -m actfocus_jax.config.schema configs/README.md'
  )
  shown = schema.help_text()
  for env in schema.ENVS:
    for name in fields.rows(env):
      assert f'| `{name}` |' in text and f'  {name} = ' in shown


def test_help_of_a_section_shows_its_rows_alone():
  lines = schema.help_text('selection').splitlines()
  assert lines[1] == '  selection.ratio = 1.0' and 'above 0' in lines[2]
  assert not any('kl.' in line for line in lines)
  with pytest.raises(errors.UsageError, match="is 'x'; allowed: run, env, "):
    schema.help_text('x')


# --- Environments ------------------------------------------------------------


def test_mixture_has_a_section_for_each_environment():
  c = schema.defaults(BOTH)
  c.mixture.sokoban.turns = 7
  lake, sokoban = schema.sections(c)
  assert (lake.name, sokoban.name) == tuple(BOTH)
  assert (lake.share, sokoban.share) == (1.0, 3.0)
  assert (lake.turns, sokoban.turns) == (5, 7)
  assert schema.most_turns(c) == 7
  assert sokoban.player_field == 'mixture.sokoban.player'
  validate.check(c)


@pytest.mark.parametrize('other', [None, 'sokoban'])
def test_own_class_has_its_arguments_as_options(other):
  env = 'own_games:Own'
  c = schema.defaults({env: 1.0, other: 1.0} if other else env)
  section = schema.sections(c)[0]
  assert section.options.to_dict() == {'depth': 3, 'name': 'x'}
  assert section.player.to_dict() == {'name': 'random', 'options': {}}
  assert section.label == 'own'


def test_sections_without_fields_are_there():
  c = schema.defaults('own_games:Plain')
  assert c.env.options.to_dict() == c.mixture.to_dict() == {}
  c = schema.defaults({'own_games:Plain': 1.0, 'sokoban': 1.0})
  assert c.mixture.plain.options.to_dict() == c.env.options.to_dict() == {}
  assert c.player.options.to_dict() == {}


@pytest.mark.parametrize(
  'env', ['chess', 'own_games:Other', 'no.module:Own', {'chess': 1.0}]
)
def test_unknown_environment_is_refused(env):
  with pytest.raises(errors.UsageError, match='env.name is'):
    schema.defaults(env)


def test_mixture_with_one_label_twice_is_refused():
  with pytest.raises(errors.UsageError, match='same label in a mixture, sokob'):
    schema.defaults({'sokoban': 1.0, 'other:Sokoban': 1.0})


# --- JSON, names, facts ------------------------------------------------------

SHARING = {'sokoban': 1.0, 'own_games:Sharing': 2.0}


@pytest.mark.parametrize('env', [*ALL, SHARING], ids=str)
def test_config_from_json_is_the_same(env):
  c = schema.defaults(env)
  c.rollout.lengths = (512, 3600)
  flat = json.loads(json.dumps(schema.to_json(c)))
  again = schema.from_json(flat)
  assert schema.to_json(again) == schema.to_json(c)
  assert again.rollout.lengths == (512, 3600) and again.is_locked
  assert resume.difference(flat, schema.to_json(c)) is None
  with pytest.raises(errors.UsageError, match='rollout.no_such, which is not'):
    schema.from_json(flat | {'rollout.no_such': 1})


@pytest.mark.parametrize(
  ('env', 'field', 'words'),
  [
    ('own_games:Own', 'env.options.dept', 'env.options has depth, name.'),
    ('own_games:Own', 'player.options.skill', 'player.options has none.'),
    ('sokoban', 'env.options.skill', 'you mean player.options.skill?'),
    ('both', 'env.options.depth', 'none; did you mean mixture.own.options.de'),
    ('both', 'env.options.dept', 'none; did you mean mixture.own.options.de'),
    ('both', 'mixture.own.options.x', 'mixture.own.options has depth, name.'),
    ('sokoban', 'limits.turn', 'did you mean limits.turns'),
  ],
)
def test_message_on_an_unknown_field_names_similar_ones(env, field, words):
  both = {'sokoban': 1.0, 'own_games:Own': 1.0}
  c = schema.defaults(both if env == 'both' else env)
  message = schema.unknown_field(field, sorted(schema.flatten(c)))
  assert message.startswith(f'{field} is not a field of the config; ')
  assert words in message and 'instructions' not in message.partition('mean')[2]


RISING = {
  'weights.beta': 0.0,
  'weights.beta_end': 0.5,
  'weights.schedule_steps': 9,
}


@pytest.mark.parametrize(
  ('changes', 'reads'),
  [
    ({}, True),
    ({'weights.beta': 0.0}, False),
    (RISING, True),
    ({'weights.signal': 'nll'}, False),
    ({'weights.signal': 'random'}, False),
    ({'weights.signal': 'logprob_shift'}, True),
    ({'weights.scheme': 'top_entropy'}, False),
    ({'weights.scheme': 'top_entropy', 'kl.coefficient': 0.1}, True),
  ],
)
def test_reference_is_needed_by_kl_and_by_some_signals(changes, reads):
  c = schema.defaults()
  for field, value in changes.items():
    section, name = field.split('.')
    c[section][name] = value
  validate.check(c)
  assert schema.has_reference(c) == reads


# --- Resume ------------------------------------------------------------------


def test_run_continues_with_another_length_but_not_other_weights():
  c = schema.defaults()
  old = schema.to_json(c)
  c.num_steps += 100
  c.eval.every = 3
  c.checkpoint.keep = 7
  c.mesh.data = 1
  assert resume.difference(old, schema.to_json(c)) is None
  c.weights.alpha = 0.2
  change = resume.difference(old, schema.to_json(c))
  assert change == 'weights.alpha was 0.1 and is now 0.2'
  c.weights.alpha, c.eval.prompts = 0.1, 8
  assert 'eval.prompts' in resume.difference(old, schema.to_json(c))
