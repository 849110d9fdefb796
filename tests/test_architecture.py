"""The shape of the house: imports go one way, files stay small.

Only the syntax is read, nothing is imported. An import inside a function
counts like any other.
"""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = 'actfocus_jax'
FILES = sorted((ROOT / PACKAGE).rglob('*.py'))
# What the modules of a room may import of other rooms: a prefix each. The
# modules beside the rooms (the loop, the commands) may import everything.
ALLOWED = {
  'algorithm': (),
  'model': ('parallel',),
  'envs': (),
  'run': (),
  'parallel': ('run.interrupt', 'run.refusals'),
  'agent': ('model', 'envs', 'parallel', 'algorithm.trajectory'),
  'learner': ('model', 'parallel', 'algorithm'),
  'report': ('algorithm', 'run.storage'),
  # A command with rooms of its own, which nobody imports.
  'aot': (
    'agent',
    'learner',
    'model',
    'parallel',
    'run',
    *('assemble', 'recipe'),
    *('dry_run', 'sizes', 'command', 'places'),
  ),
}
# Read by people and by scripts before there is a device, or without one.
WITHOUT_JAX = (
  'envs',
  'run.settings',
  'command',
  'distributed',
  'places',
  'model.architecture',
  'model.files',
  'parallel.mesh_shapes',
  'sizes',
)
LONGEST = 450


def module_of(path):
  """`agent.chat` for actfocus_jax/agent/chat.py, `agent` for its __init__."""
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


def needed(module):
  """Everything that is imported when a module is, outside of functions."""
  seen, todo = set(), [module]
  while todo:
    name = todo.pop()
    if name in seen or name not in SOURCES:
      continue
    seen.add(name)
    tree = ast.parse(SOURCES[name])
    for function in ast.walk(tree):
      if isinstance(function, ast.FunctionDef):
        function.body = [ast.Pass()]
    found = list(imports(ast.unparse(tree), name, is_package(name)))
    yield from found
    ours = [f.removeprefix(f'{PACKAGE}.') for f in found if PACKAGE in f]
    parents = [n.rpartition('.')[0] for n in (*ours, name)]
    todo += [*ours, *parents, '']


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
    ('envs.base', 'from actfocus_jax.agent import chat'),
    ('model.transformer', 'from actfocus_jax.algorithm import trajectory'),
    ('run.metrics', 'import actfocus_jax.report'),
    ('agent.rollout', 'from actfocus_jax.algorithm import losses'),
    ('agent.rollout', 'from actfocus_jax import algorithm'),
    ('agent.rollout', 'from actfocus_jax.learner import step'),
    ('agent.rollout', 'from actfocus_jax.run import settings'),
    ('learner.step', 'from actfocus_jax.agent import episode'),
    ('learner.step', 'from actfocus_jax import envs'),
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
    ('agent.rollout', 'from actfocus_jax.algorithm import trajectory'),
    ('agent.rollout', 'from actfocus_jax.algorithm.trajectory import check'),
    ('agent.rollout', 'from actfocus_jax.parallel import mesh'),
    ('learner.step', 'from actfocus_jax.algorithm import losses, weights'),
    ('learner.step', 'from . import state'),
    ('report.plots', 'from actfocus_jax.report import rows'),
    ('algorithm.losses', 'import jax\nfrom jax import numpy as jnp'),
  ],
)
def test_an_allowed_arrow_is_not(module, source):
  assert list(imports(source, module)) and forbidden(source, module) == []


@pytest.mark.parametrize(
  'module',
  [m for m in SOURCES if any(is_within(m, name) for name in WITHOUT_JAX)],
)
def test_no_device_library_is_imported(module):
  heavy = {'jax', 'flax', 'optax', 'orbax', 'transformers'}
  assert heavy.isdisjoint(name.split('.')[0] for name in needed(module))


def test_a_device_library_is_seen():
  assert 'jax' in set(needed('algorithm.losses'))
  assert 'jax' in {name.split('.')[0] for name in needed('learner.step')}
  assert not {'jax', 'flax'} & set(needed('envs.base'))


@pytest.mark.parametrize('module', SOURCES)
def test_no_file_is_two_rooms(module):
  assert SOURCES[module].count('\n') <= LONGEST


def test_every_module_says_what_it_is():
  assert len(SOURCES) > 40
  for module, source in SOURCES.items():
    assert ast.get_docstring(ast.parse(source)), module
