"""Classes of the user's own: what can be an option, what is told of errors."""

import json
import sys

import pytest

from actfocus_jax import errors
from actfocus_jax.config import env_schema, plugins, resume, schema, validate

GAMES = """
class Game:
  def __init__(
    self, depth=3, name='x', sizes=(1, 2), *, share: 'float | None' = None
  ):
    self.given = depth, name, sizes, share


class Odd:
  def __init__(self, depth=3):
    if depth % 2:
      raise ValueError(f'depth is {depth}. ')


class Leaving:
  def __init__(self):
    raise SystemExit


class Keywords:
  def __init__(self, **kw):
    pass


class Positional:
  def __init__(self, depth=3, /):
    pass


class Untyped:
  def __init__(self, share=None):
    pass


class Unknown:
  def __init__(self, share: 'Share | None' = None):
    pass


class Of2:
  def __init__(self, share: int | float | None = None):
    pass


class Listing:
  def __init__(self, sizes=[1]):
    pass


class Nested:
  def __init__(self, sizes=((1, 2),)):
    pass


class Taken:
  def __init__(self, items=3):
    pass


class Strict:
  def __init__(self, depth):
    pass


three = 3
"""
BROKEN = {
  'syntax': 'def f(:\n',
  'raising': '\nraise RuntimeError("no card.")\n',
  'leaving': 'import sys\nsys.exit(0)\n',
  'needy': 'import not_installed_here\n',
}


@pytest.fixture(autouse=True)
def modules(tmp_path, monkeypatch):
  sources = {'games': GAMES, **BROKEN}
  for name, source in sources.items():
    (tmp_path / f'own_{name}.py').write_text(source)
  monkeypatch.syspath_prepend(tmp_path)
  yield
  for name in sources:
    sys.modules.pop(f'own_{name}', None)


def test_options_are_the_arguments_and_come_back_from_json():
  c = schema.defaults('own_games:Game')
  assert c.env.options.to_dict() == {
    'depth': 3,
    'name': 'x',
    'sizes': (1, 2),
    'share': None,
  }
  validate.check(c)
  with pytest.raises(TypeError):
    c.env.options.share = 'much'
  c.env.options.update(share=0.5, sizes=(3,))
  flat = json.loads(json.dumps(schema.to_json(c)))
  again = schema.from_json(flat)
  assert resume.difference(flat, again) is None
  made = plugins.make(
    'env.name', again.env.name, 'env.options', again.env.options
  )
  assert made.given == (3, 'x', (3,), 0.5)


@pytest.mark.parametrize(
  ('name', 'words'),
  [
    ('Keywords', ["argument '**kw'", 'keyword arguments']),
    ('Positional', ["'depth", 'no keyword']),
    ('Untyped', ["'share' has the default None", '`int | None`']),
    ('Unknown', ["'share' has the default None", '`int | None`']),
    ('Of2', ["'share' has the default None", '`int | None`']),
    ('Listing', ["'sizes' has a default of type list", 'tuple of these']),
    ('Nested', ["'sizes' has a default of type tuple", 'tuple of these']),
    ('Taken', ["'items' has a name"]),
    ('Strict', ["'depth' has no default"]),
    ('three', ['no class but of type int', 'package.module:Class']),
  ],
)
def test_what_cannot_be_an_option_is_refused(name, words):
  with pytest.raises(errors.UsageError) as error:
    env_schema.options(f'own_games:{name}')
  for word in (f"env.name is 'own_games:{name}', ", 'allowed: ', *words):
    assert word in str(error.value)


def test_arrays_as_defaults_are_refused(monkeypatch):
  import numpy as np
  import own_games

  def game(sizes=np.ones(2)):  # noqa: B008
    pass

  monkeypatch.setattr(own_games, 'array', game, raising=False)
  with pytest.raises(errors.UsageError, match='default of type ndarray'):
    schema.defaults('own_games:array')


@pytest.mark.parametrize(
  ('module', 'words'),
  [
    ('own_syntax', 'SyntaxError: invalid syntax (own_syntax.py, line 1); all'),
    ('own_raising', 'RuntimeError: no card (own_raising.py, line 2); allowed'),
    ('own_leaving', 'SystemExit: 0 (own_leaving.py, line 2); allowed'),
    ('own_needy', "named 'not_installed_here' (own_needy.py, line 1); all"),
    ('nowhere', "No module named 'nowhere'; allowed: package.module:Class"),
    ('', 'Empty module name; allowed'),
  ],
)
def test_modules_that_cannot_be_imported_are_refused(module, words):
  with pytest.raises(errors.UsageError) as error:
    schema.defaults(f'{module}:Game')
  begin = f"env.name is '{module}:Game', which cannot be imported: "
  assert str(error.value).startswith(begin) and words in str(error.value)


@pytest.mark.parametrize(
  ('name', 'options', 'words'),
  [
    ('Odd', {'depth': 5}, '(depth=5): ValueError: depth is 5 (own_games.py, l'),
    ('Leaving', {}, 'SystemExit() (own_games.py'),
    ('Odd', {'width': 5}, "unexpected keyword argument 'width'; allowed"),
  ],
)
def test_classes_that_cannot_be_made_are_refused(name, options, words):
  with pytest.raises(errors.UsageError) as error:
    plugins.make('env.name', f'own_games:{name}', 'env.options', options)
  begin = f"env.name is 'own_games:{name}', which cannot be made with env.opti"
  assert str(error.value).startswith(begin) and words in str(error.value)


# --- The fields around them ---------------------------------------------------


def test_players_of_ones_own_are_looked_at_early():
  c = schema.defaults('sokoban')
  c.player.name = 'own_games:Nobody'
  with pytest.raises(
    errors.UsageError, match='player.name is .*own_games:Nobo'
  ):
    validate.check(c)
  c.model.path = 'some/model'  # Then no player plays.
  validate.check(c)
  c.player.options.skill = 0.3
  with pytest.raises(errors.UsageError) as error:
    validate.check(c)
  assert str(error.value).startswith('player.options.skill is 0.3')
  assert 'own_games:Nobody' in str(error.value)


@pytest.mark.parametrize(
  ('field', 'value'), [('env.boards', 'some.txt'), ('player.name', 'random2')]
)
def test_a_mixture_refuses_what_it_would_not_read(field, value):
  c = schema.defaults({'sokoban': 1.0, 'own_games:Game': 1.0})
  section, name = field.split('.')
  c[section][name] = value
  with pytest.raises(errors.UsageError, match=f'{field} is .*of a mixture has'):
    validate.check(c)


def test_boards_may_lie_at_home(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  (tmp_path / 'levels.txt').write_text('')
  c = schema.defaults('sokoban')
  c.env.boards = '~/levels.txt'
  validate.check(c)


@pytest.mark.parametrize(
  ('env', 'field', 'words'),
  [
    ('own_games:Game', 'env.options.dept', 'has depth, name, share, sizes.'),
    ('own_games:Game', 'player.options.skill', 'player.options has none.'),
    ('sokoban', 'env.options.skill', 'you mean player.options.skill?'),
    ('both', 'env.options.depth', 'none; did you mean mixture.game.options.de'),
    ('both', 'env.options.dept', 'none; did you mean mixture.game.options.de'),
    ('both', 'mixture.game.options.x', 'options has depth, name, share, sizes'),
    ('sokoban', 'limits.turn', 'did you mean limits.turns'),
  ],
)
def test_unknown_fields_are_told_with_those_there_are(env, field, words):
  both = {'sokoban': 1.0, 'own_games:Game': 1.0}
  c = schema.defaults(both if env == 'both' else env)
  told = schema.unknown_field(field, sorted(schema.flatten(c)))
  assert told.startswith(f'{field} is no field of the config; ')
  assert words in told and 'instructions' not in told.partition('mean')[2]
