"""Classes of the user's own: options, imports, errors."""

import json
import sys

import pytest

from actfocus_jax import errors
from actfocus_jax.config import plugins, resume, schema, validate

GAMES = """
class Game:
  def __init__(
    self, depth=3, name='x', sizes=(1, 2), *, share: 'float | None' = None
  ):
    self.given = depth, name, sizes, share


def odd(depth=3):
  raise ValueError(f'depth is {depth}. ')


def leaving():
  raise SystemExit


def keywords(**kw): pass
def positional(depth=3, /): pass
def untyped(share=None): pass
def unknown(share: 'Share | None' = None): pass
def of_two(share: int | float | None = None): pass
def listing(sizes=[1]): pass
def nested(sizes=((1, 2),)): pass
def taken(items=3): pass
def strict(depth): pass
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


def test_options_are_arguments_and_survive_json():
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
  assert resume.difference(flat, schema.to_json(again)) is None
  made = plugins.make(
    'env.name', again.env.name, 'env.options', again.env.options
  )
  assert made.given == (3, 'x', (3,), 0.5)


@pytest.mark.parametrize(
  ('name', 'words'),
  [
    ('keywords', ["argument '**kw'", 'keyword arguments']),
    ('positional', ["'depth", 'not a keyword']),
    ('untyped', ["'share' has the default None", '`int | None`']),
    ('unknown', ["'share' has the default None", '`int | None`']),
    ('listing', ["'sizes' has a default of type list", 'tuple of these']),
    ('nested', ["'sizes' has a default of type tuple", 'tuple of these']),
    ('taken', ["'items' has a name"]),
    ('strict', ["'depth' has no default"]),
    ('three', ['not a class but of type int', 'package.module:Class']),
  ],
)
def test_class_with_another_kind_of_argument_is_refused(name, words):
  with pytest.raises(errors.UsageError) as error:
    plugins.options('env.name', f'own_games:{name}')
  for word in (f"env.name is 'own_games:{name}', ", 'allowed: ', *words):
    assert word in str(error.value)


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
def test_module_that_cannot_be_imported_is_refused(module, words):
  with pytest.raises(errors.UsageError) as error:
    schema.defaults(f'{module}:Game')
  begin = f"env.name is '{module}:Game', which cannot be imported: "
  assert str(error.value).startswith(begin) and words in str(error.value)


@pytest.mark.parametrize(
  ('name', 'options', 'words'),
  [
    ('odd', {'depth': 5}, '(depth=5): ValueError: depth is 5 (own_games.py, l'),
    ('leaving', {}, 'SystemExit() (own_games.py'),
    ('odd', {'width': 5}, "unexpected keyword argument 'width'; allowed"),
  ],
)
def test_class_that_raises_is_refused(name, options, words):
  with pytest.raises(errors.UsageError) as error:
    plugins.make('env.name', f'own_games:{name}', 'env.options', options)
  begin = f"env.name is 'own_games:{name}', which cannot be made with env.opti"
  assert str(error.value).startswith(begin) and words in str(error.value)


def test_own_player_is_imported_by_the_check():
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
