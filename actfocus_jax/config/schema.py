"""Configs: defaults, facts that follow from the fields, names, JSON, help.

Fields and what they allow are the rows of fields.py. To rewrite the tables of
the page after a change of a row:

    python -m actfocus_jax.config.schema configs/README.md
"""

import dataclasses
import difflib
import pathlib
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import ml_collections
from ml_collections import config_dict

from actfocus_jax import errors
from actfocus_jax.algorithm import signals
from actfocus_jax.config import fields

ConfigDict = ml_collections.ConfigDict
ALGOS, ENVS, ESTIMATORS_OF = fields.ALGOS, fields.ENVS, fields.ESTIMATORS_OF

# Training boards have seeds from here on, evaluation boards below.
FIRST_TRAINING_SEED = 10_000


def defaults(env: str | Mapping[str, float] = 'frozen_lake') -> ConfigDict:
  """Return the config of an environment in which every field has its default.

  `env` is a key of envs.ENVS or 'package.module:Class', whose keyword arguments
  are the options. Several names with their shares of the groups are a mixture:
  {'frozen_lake': 1.0, 'sokoban': 3.0}. All fields that exist are in the config;
  config files change values and lock it.

  Raises:
    UsageError: the environment does not exist, an argument of its class cannot
      be a field, or two environments have one label.
  """
  c = ConfigDict({'mixture': {}})
  for name, field in fields.rows(env).items():
    *sections, leaf = name.split('.')
    parent = c
    for section in sections:
      if section not in parent:
        parent[section] = ConfigDict()
      parent = parent[section]
    is_open = field.default is None
    kind = field.allowed.kind
    parent[leaf] = config_dict.placeholder(kind) if is_open else field.default
  # Sections stay where there are no fields for them.
  parts = [c.env, c.player, *c.mixture.values()]
  for section in (*parts, *(part.player for part in c.mixture.values())):
    if 'options' not in section:
      section.options = ConfigDict()
  return c


# The default mesh: every device holds its own rows and all of the parameters.
MESH = defaults().mesh.to_dict()


def env_of(c: ConfigDict) -> str | dict[str, float]:
  """Return the argument of `defaults` that a config was made with."""
  if c.env.name == fields.MIXTURE:
    return {part.name: part.share for part in c.mixture.values()}
  return c.env.name


def schema_of(c: ConfigDict) -> ConfigDict:
  """Return the defaults for the environments of a config."""
  return defaults(env_of(c))


def has_reference(c: ConfigDict) -> bool:
  """Return whether the KL term or the token weights need the reference."""
  reads = c.weights.signal not in signals.WITHOUT_REFERENCE
  return c.kl.coefficient > 0 or (has_signal(c) and reads)


def has_signal(c: ConfigDict) -> bool:
  """Return whether the token weights read the signal: beta becomes above 0."""
  return c.weights.scheme == 'action' and any(
    (c.weights.beta, c.weights.beta_end or 0.0)
  )


def estimator(c: ConfigDict) -> str:
  """Return the name of the advantage estimator, which is never `auto`."""
  name = c.advantage.estimator
  return ESTIMATORS_OF[c.algo][0] if name == 'auto' else name


def has_field(c: ConfigDict, field: str) -> bool:
  """Return whether the algorithm and the estimator of a config have a field."""
  section, *rest = field.split('.')
  if section == 'advantage' and len(rest) > 1:
    return rest[0] == estimator(c)
  return section != 'critic' or c.algo == 'ppo'


def skips_without_spread(c: ConfigDict) -> bool:
  """Return whether a step without spread in any kept group is skipped.

  PPO learns from every episode, unless groups are chosen by their spread.
  """
  chooses = c.selection.ratio < 1 or c.selection.rule == 'top_p'
  return c.algo == 'grpo' or chooses


# --- Environments of a config ------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Section:
  """Fields of one environment of a run; those not listed are as in a config.

  Attributes:
    field: prefix of its fields, 'env' or 'mixture.LABEL'.
    limits_field: prefix of turns, max_actions and action_budget.
    player_field: prefix of the fields of its player.
    label: name in metrics.
    options: keyword arguments of the environment.
    player: name and options of its player.
  """

  field: str
  limits_field: str
  player_field: str
  label: str
  name: str
  share: float
  options: Mapping[str, Any]
  boards: str
  turns: int
  max_actions: int
  action_budget: int
  player: Mapping[str, Any]


def sections(c: ConfigDict) -> list[Section]:
  """Return the environments of a run; those of a mixture sorted by label."""
  if c.env.name == fields.MIXTURE:
    found = []
    for label in sorted(c.mixture):
      name = f'mixture.{label}'
      names = (name, name, f'{name}.player', label)
      found.append(Section(*names, **c.mixture[label]))
    return found
  label = c.env.name.rpartition(':')[2].lower()
  bounds = {name: c.limits[name] for name in fields.limits('')}
  own = {name: c.env[name] for name in ('name', 'options', 'boards')}
  names = ('env', 'limits', 'player', label)
  return [Section(*names, share=1.0, player=c.player, **bounds, **own)]


def most_turns(c: ConfigDict) -> int:
  """Return the turns of the longest episode of any environment."""
  return max(section.turns for section in sections(c))


# --- Fields by their dotted names --------------------------------------------


def flatten(c, prefix: str = '') -> dict[str, Any]:
  """Return all values by dotted name; a tuple is one value."""
  flat = {}
  for key in c:
    value = c[key]
    if isinstance(value, (ConfigDict, dict)):
      flat.update(flatten(value, f'{prefix}{key}.'))
    else:
      flat[f'{prefix}{key}'] = value
  return flat


def get(c: ConfigDict, field: str):
  """Return the value of a dotted name."""
  for name in field.split('.'):
    c = c[name]
  return c


def unknown_field(field: str, known: Iterable[str]) -> str:
  """Return the message on a field that does not exist, with similar names."""
  known, there = list(known), ''
  section, _, name = field.rpartition('.')
  near = difflib.get_close_matches(field, known, n=3, cutoff=0.5)
  if section.endswith('options'):  # of an environment or a player
    names = {f: f.rpartition('.')[2] for f in known if '.options.' in f}
    siblings = [n for f, n in names.items() if f.startswith(f'{section}.')]
    there = f'; {section} has {", ".join(siblings) or "none"}'
    alike = difflib.get_close_matches(name, names.values())
    alike = [name] if siblings else alike
    near = [f for f, n in names.items() if n in alike]
  hint = f'; did you mean {" or ".join(near)}?' if near else '.'
  return f'{field} is not a field of the config{there}{hint}'


def to_json(c: ConfigDict) -> dict[str, Any]:
  """Return the config as plain JSON values by dotted name, sorted."""
  return {
    key: list(value) if isinstance(value, tuple) else value
    for key, value in sorted(flatten(c).items())
  }


def from_json(flat: dict[str, Any]) -> ConfigDict:
  """Return the config that `to_json` described, locked.

  A field that is absent has its default.

  Raises:
    UsageError: a field does not exist in this version.
  """
  env = flat.get('env.name', 'frozen_lake')
  if env == fields.MIXTURE:
    parts = [f.split('.') for f in flat if f.startswith('mixture.')]
    labels = [x[1] for x in parts if len(x) == 3 and x[2] == 'share']
    parts = [f'mixture.{label}' for label in labels]
    env = {flat[f'{part}.name']: flat[f'{part}.share'] for part in parts}
  c = defaults(env)
  known = flatten(c)
  for field, value in flat.items():
    if field not in known:
      raise errors.UsageError(f'config.json has {field}, which is not a field.')
    section, _, name = field.rpartition('.')
    parent = get(c, section) if section else c
    parent[name] = tuple(value) if isinstance(value, list) else value
  return c.lock()


# --- Help and the page -------------------------------------------------------

_BEGIN, _END = '<!-- fields -->\n', '<!-- end of fields -->'


def help_text(section: str | None = None) -> str:
  """Return the rows of one section, or of all, for the command line.

  Raises:
    UsageError: the section does not exist.
  """
  lines = []
  for name, about, rows in fields.documented():
    if section in (None, name.partition('.')[0]):
      lines.append(f'{name}: {about}')
      for f in rows:
        lines.append(f'  {f.name} = {f.default!r}')
        lines.append(f'      {f.meaning} [{f.allowed.text}]')
      lines.append('')
  if not lines:
    names = [name for name, *_ in fields.documented() if '.' not in name]
    raise errors.UsageError(
      f'--help_config is {section!r}; allowed: {", ".join(names)}.'
    )
  return '\n'.join(lines)


def page(text: str) -> str:
  """Return the text of configs/README.md with the tables of the rows."""
  lines = []
  for name, about, rows in fields.documented():
    lines += [f'### {name}', '', about, '']
    lines += ['| field | default | allowed | meaning |', '|---|---|---|---|']
    lines += [
      f'| `{f.name}` | `{f.default!r}` | {f.allowed.text} | {f.meaning} |'
      for f in rows
    ]
    lines.append('')
  before, _, rest = text.partition(_BEGIN)
  after = rest.partition(_END)[2]
  return ''.join((before, _BEGIN, '\n'.join(lines), '\n', _END, after))


if __name__ == '__main__':
  _file = pathlib.Path(sys.argv[1])
  _file.write_text(page(_file.read_text()))
