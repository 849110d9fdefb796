"""The shape of the house: imports go one way, between rooms and files.

Only the syntax is read, nothing is imported. An import inside a function
counts like any other.
"""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = 'actfocus_jax'
FILES = sorted((ROOT / PACKAGE).rglob('*.py'))
# What the modules of a room may import of other rooms: a prefix each. The
# modules beside the rooms (build, loop, the commands) may import everything.
ALLOWED = {
  'algorithm': (),
  'model': ('parallel',),
  'envs': (),
  'text': ('model.files',),
  'parallel': ('errors',),
  'config': ('errors', 'algorithm', 'envs', 'model', 'text', 'parallel'),
  'run': ('errors', 'config', 'parallel', 'model.files'),
  'rollout': ('text', 'model', 'envs', 'parallel', 'algorithm.trajectory'),
  'learner': ('model', 'parallel', 'algorithm'),
  'warmstart': (
    *('errors', 'rollout', 'text', 'model', 'envs', 'parallel', 'run'),
    *('learner', 'algorithm.trajectory'),
  ),
  'report': ('algorithm', 'run.storage'),
  'cli': ('errors', 'config', 'model', 'parallel', 'run', 'build'),
  # A command with rooms of its own, which nobody imports.
  'aot': (
    *('errors', 'rollout', 'learner', 'model', 'parallel', 'config', 'run'),
    *('build', 'cli'),
  ),
}


def module_of(path):
  """`text.chat` for actfocus_jax/text/chat.py, `text` for its __init__."""
  parts = path.relative_to(ROOT / PACKAGE).with_suffix('').parts
  return '.'.join(part for part in parts if part != '__init__')


SOURCES = {module_of(path): path.read_text() for path in FILES}


def imports(source, module, is_package=False):
  """Absolute names that a source imports, `a.b` of `from a import b` too."""
  here = [PACKAGE, *module.split('.')] if module else [PACKAGE]
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      up = node.level - is_package
      base = here[: len(here) - up] if node.level else []
      base = [*base, node.module] if node.module else base
      yield from ('.'.join([*base, alias.name]) for alias in node.names)


def is_within(name, prefix):
  return name == prefix or name.startswith(f'{prefix}.')


def forbidden(source, module, is_package=False):
  """Imports of a module that the plan of the house does not allow."""
  room = module.split('.')[0]
  if room not in ALLOWED:
    return []
  allowed = [f'{PACKAGE}.{other}' for other in (room, *ALLOWED[room])]
  return [
    name
    for name in imports(source, module, is_package)
    if is_within(name, PACKAGE)
    and not any(is_within(name, prefix) for prefix in allowed)
  ]


def is_package(module):
  return (ROOT / PACKAGE).joinpath(*module.split('.')).is_dir()


def circles(sources):
  """Circles of files: each a list of modules that import each other in turn."""
  arrows = {}
  for module, source in sources.items():
    names = {
      name.removeprefix(f'{PACKAGE}.')
      for name in imports(source, module, is_package(module))
      if is_within(name, PACKAGE)
    }
    # `from a import b` reads a/b.py, or a/__init__.py for a name in it.
    arrows[module] = {
      name if name in sources else name.rpartition('.')[0] for name in names
    } & set(sources) - {module, ''}
  found, done = [], set()

  def visit(module, path):
    if module in path:
      found.append(path[path.index(module) :])
    elif module not in done:
      for other in sorted(arrows[module]):
        visit(other, [*path, module])
      done.add(module)

  for module in sorted(sources):
    visit(module, [])
  return found


def test_every_room_is_known():
  rooms = {module.split('.')[0] for module in SOURCES if is_package(module)}
  assert rooms - {''} == set(ALLOWED)


@pytest.mark.parametrize('module', SOURCES)
def test_imports_go_one_way(module):
  source = SOURCES[module]
  assert forbidden(source, module, is_package(module)) == []


@pytest.mark.parametrize(
  ('module', 'source'),
  [
    ('algorithm.losses', 'import actfocus_jax.model.scoring'),
    ('algorithm.losses', 'from actfocus_jax import model'),
    ('algorithm.losses', 'from actfocus_jax.run import metrics as m'),
    ('algorithm.losses', 'from ..envs import base'),
    ('algorithm.losses', 'from .. import envs'),
    ('algorithm.losses', 'def f():\n  from actfocus_jax.envs import base'),
    ('algorithm.losses', 'from actfocus_jax import loop'),
    ('envs.base', 'from actfocus_jax.text import chat'),
    ('model.transformer', 'from actfocus_jax.algorithm import trajectory'),
    ('run.metrics', 'import actfocus_jax.report'),
    ('rollout.collector', 'from actfocus_jax.algorithm import losses'),
    ('rollout.collector', 'from actfocus_jax import algorithm'),
    ('rollout.collector', 'from actfocus_jax.learner import update'),
    ('rollout.collector', 'from actfocus_jax.config import schema'),
    ('learner.update', 'from actfocus_jax.rollout import episode'),
    ('learner.update', 'from actfocus_jax import envs'),
    ('report.plots', 'from actfocus_jax.parallel import mesh'),
  ],
)
def test_a_forbidden_arrow_is_seen(module, source):
  assert len(forbidden(source, module)) == 1
  # And the same line is nothing special beside the rooms.
  assert forbidden(source, 'loop') == []


@pytest.mark.parametrize(
  ('module', 'source'),
  [
    ('rollout.collector', 'from actfocus_jax.algorithm import trajectory'),
    (
      'rollout.collector',
      'from actfocus_jax.algorithm.trajectory import check',
    ),
    ('rollout.collector', 'from actfocus_jax.parallel import mesh'),
    ('learner.update', 'from actfocus_jax.algorithm import losses, weights'),
    ('learner.update', 'from . import state'),
    ('report.plots', 'from actfocus_jax.report import rows'),
    ('algorithm.losses', 'import jax\nfrom jax import numpy as jnp'),
  ],
)
def test_an_allowed_arrow_is_not(module, source):
  assert list(imports(source, module)) and forbidden(source, module) == []


def test_no_file_imports_itself_through_others():
  assert circles(SOURCES) == []


def test_a_circle_of_files_is_seen():
  sources = {
    'loop': 'from actfocus_jax import build',
    'build': 'import actfocus_jax.envs.base',
    'envs.base': 'def f():\n  from actfocus_jax import build',
  }
  assert circles(sources) == [['build', 'envs.base']]


def test_config_object_stays_in_config_build_loop_and_commands():
  holders = {
    module
    for module, source in SOURCES.items()
    if any(is_within(n, 'ml_collections') for n in imports(source, module))
  }
  commands = ('build', 'loop', 'compare', 'evaluate', 'cli', 'config', 'aot')
  assert 'config.schema' in holders
  assert not {m for m in holders if m.split('.')[0] not in commands}


def test_lines_that_the_mutants_break_exist():
  check = [sys.executable, 'tests/bench/mutants.py', '--check']
  subprocess.run(check, cwd=ROOT, check=True, capture_output=True)


def test_every_module_says_what_it_is():
  assert len(SOURCES) > 40
  for module, source in SOURCES.items():
    assert ast.get_docstring(ast.parse(source)), module
