"""One config on one topology: choose a mesh, compile, report; and several.

The answer of a cell is kept in a file named by all that it depends on, so a
table that was interrupted goes on where it stopped.
"""

import dataclasses
import functools
import gc
import hashlib
import importlib.metadata
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import ml_collections

from actfocus_jax import build
from actfocus_jax.aot import (
  choice,
  estimate,
  measure,
  programs,
  roofline,
  topology,
  workload,
)
from actfocus_jax.config import schema
from actfocus_jax.model import architecture
from actfocus_jax.parallel import mesh as mesh_lib

# What the compiled programs are made of, and what only shows the answers.
_ROOMS = ('agent', 'algorithm', 'aot', 'learner', 'model', 'parallel')
_FILES = ('assemble', 'dry_run', 'memory', 'recipe', 'run/checks', 'sizes')
_COMPILER = ('jax', 'jaxlib', 'libtpu')
_SHOWING = ('__main__', 'many', 'plot', 'scale', 'table')


@dataclasses.dataclass(frozen=True)
class Question:
  """What is asked.

  Attributes:
    c: A checked config.
    config: Of the model.
    where: The slices.
    work: How long episodes are.
    efficiency: Shares of the peaks that are reached.
    price: Dollars per chip and hour; None is the list price.
    is_auto: Whether the mesh is chosen, or the config's.
    with_fused: Whether score and update are compiled as one program, too.
  """

  c: ml_collections.ConfigDict
  config: architecture.Config
  where: topology.Topology
  work: workload.Workload
  efficiency: roofline.Efficiency
  price: float | None = None
  is_auto: bool = True
  with_fused: bool = False

  def key(self) -> str:
    """A name for the question and the code that answers it."""
    parts = [
      schema.to_json(self.c),
      dataclasses.asdict(self.config),
      str(self.where),
      dataclasses.asdict(self.work),
      dataclasses.asdict(self.efficiency),
      [self.price, self.is_auto, self.with_fused, _code()],
      [importlib.metadata.version(name) for name in _COMPILER],
    ]
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@functools.cache
def _code() -> str:
  """A fingerprint of the sources that a program is made of, as it began."""
  root = pathlib.Path(build.__file__).parent
  digest = hashlib.sha256()
  for room in _ROOMS:
    for file in sorted((root / room).rglob('*.py')):
      if room != 'aot' or file.stem not in _SHOWING:
        digest.update(file.read_bytes())
  for name in _FILES:
    digest.update((root / f'{name}.py').read_bytes())
  return digest.hexdigest()


def answer(
  question: Question, *, note: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
  """Compiles the programs of a config for a topology.

  Meshes are tried from the fastest one on, by formula, until one fits; of none
  that fits, the last one is reported.

  Args:
    question: What is asked.
    note: Told of each program.

  Returns:
    `estimate.report`, or a dict with the field `refused`: why no mesh can run
    the config.

  Raises:
    UsageError: When the compiler does not know the topology, or the mesh
      that the config names cannot run it.
  """
  q = question
  devices = topology.devices(q.where)
  memory = measure.usable(devices)
  if q.is_auto:
    found = choice.candidates(q.c, q.config, q.where, q.work)
    tried = choice.promising(found, memory)
    if not tried:
      return _refused(q, found, memory)
  else:
    tried = [choice.given(q.c, q.config, q.where, q.work)]
  for chosen in tried:
    note(f'mesh {chosen.shape}')
    told = _told(q, chosen, devices, memory, note, until_full=len(tried) > 1)
    gc.collect()
    jax.clear_caches()
    if told['fits']:
      break
  return told


def _told(q: Question, chosen, devices, memory, note, *, until_full):
  mesh = mesh_lib.make_mesh(**chosen.c.mesh, devices=devices)
  run = programs.Run(chosen.c, q.config, mesh, q.work, with_fused=q.with_fused)
  costs = measure.all_programs(
    run, q.where, memory, note=note, until_full=until_full
  )
  told = estimate.report(
    chosen,
    run,
    q.where,
    costs,
    memory=memory,
    efficiency=q.efficiency,
    price=q.where.chip.price if q.price is None else q.price,
  )
  return told | {
    'flags': chosen.flags(q.c),
    'assumptions': estimate.assumptions(q.work),
  }


def _refused(q: Question, found, memory: float) -> dict[str, Any]:
  """Why nothing was compiled."""
  told = {'topology': str(q.where), 'chips': q.where.chips, 'fits': False}
  if not found:
    return told | {
      'refused': f'no mesh of {q.where.chips} chips divides '
      f'{q.c.rollout.prompts * q.c.rollout.members} episodes, mini-batches of '
      f'{q.c.learner.minibatch} and the heads of the model'
    }
  least = min(one.by_formula for one in found)
  return told | {
    'refused': f'does not fit: {least / 1e9:.1f} of {memory / 1e9:.1f} GB '
    'by formula'
  }


def kept(
  question: Question,
  directory: pathlib.Path | None,
  *,
  note: Callable[[str], None] = lambda text: None,
) -> tuple[dict[str, Any], bool]:
  """`answer`, or what it said before; and whether it did."""
  file = None
  if directory is not None:
    file = directory / 'cells' / f'{question.key()}.json'
    if file.exists():
      return json.loads(file.read_text()), True
  told = answer(question, note=note)
  if file is not None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix('.partial')
    partial.write_text(json.dumps(told, indent=1))
    partial.replace(file)
  return told, False
