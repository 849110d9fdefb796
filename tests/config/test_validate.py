"""Checks of whole configs: the files of configs/ and rules between fields."""

import importlib.util
import pathlib

import pytest

from actfocus_jax import errors
from actfocus_jax.config import presets, schema, validate

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIGS = sorted(path.stem for path in (ROOT / 'configs').glob('*.py'))
BOTH = {'frozen_lake': 1.0, 'sokoban': 3.0}


def load(name: str, argument: str | None = None):
  path = ROOT / 'configs' / f'{name}.py'
  spec = importlib.util.spec_from_file_location(name, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(argument)


def change(c, changes):
  for field, value in changes.items():
    section, _, name = field.rpartition('.')
    (schema.get(c, section) if section else c)[name] = value
  return c


# --- The files of configs/ ---------------------------------------------------


@pytest.mark.parametrize('name', CONFIGS)
@pytest.mark.parametrize('size', ['tiny', *presets.MODELS])
@pytest.mark.parametrize('algo', schema.ALGOS)
def test_every_config_passes_its_own_checks(name, size, algo):
  for weights, changes in presets.WEIGHTS.items():
    c = load(name, f'size={size},weights={weights},algo={algo}')
    validate.check(c)
    assert c.is_locked and c.algo == algo
    default = schema.defaults().weights.to_dict()
    assert c.weights.to_dict() == default | changes
    assert bool(c.model.path) == (size != 'tiny')


# Method, section 7: P, G, turns, actions in a turn and in an episode, steps,
# context, boards and episodes of an evaluation, KL of GRPO.
PAPER = {
  'sokoban': (8, 16, 5, 2, 10, 200, 3600, 32, 16, 0.0),
  'frozen_lake': (8, 16, 5, 2, 10, 200, 3600, 32, 16, 0.0),
  'sudoku': (8, 16, 8, 2, 16, 200, 3600, 32, 16, 0.0),
  'webshop': (16, 8, 9, 1, 9, 100, 8192, 256, 1, 0.001),
}
SELECTION = {
  ('frozen_lake', 'grpo'): 1.0,
  ('webshop', 'grpo'): 1.0,
  ('webshop', 'ppo'): 1.0,
}


@pytest.mark.parametrize('algo', schema.ALGOS)
@pytest.mark.parametrize('name', PAPER)
def test_config_has_the_numbers_of_the_paper(name, algo):
  """Numbers of arXiv 2605.14558."""
  c = load(name, f'size=0.5b,algo={algo}')
  *numbers, kl = PAPER[name]
  assert numbers == [
    *(c.rollout.prompts, c.rollout.members, c.limits.turns),
    *(c.limits.max_actions, c.limits.action_budget, c.num_steps),
    *(c.limits.context, c.eval.prompts, c.eval.members),
  ]
  assert c.kl.coefficient == (kl if algo == 'grpo' else 0.0)
  assert (c.kl.estimator, c.selection.rule) == ('k1', 'top_k')
  assert c.selection.ratio == SELECTION.get((name, algo), 0.25)
  assert (c.critic.clip, c.critic.optimizer.learning_rate) == (0.5, 1e-5)
  gae = c.advantage.gae
  assert (gae.discount, gae.lam, gae.reward_placement) == (1.0, 1.0, 'final')
  assert c.loss.reduction == 'weighted_token_mean'
  assert (c.limits.response_tokens, c.limits.format_penalty) == (400, -0.1)
  assert (c.weights.alpha, c.weights.beta) == (0.1, 0.5)
  assert (c.loss.clip_low, c.loss.clip_high) == (0.2, 0.28)
  assert c.loss.dual_clip == 3.0
  assert c.optimizer.learning_rate == 1e-6
  assert (c.optimizer.b1, c.optimizer.b2) == (0.9, 0.999)
  assert (c.optimizer.weight_decay, c.optimizer.clip_norm) == (0.01, 1.0)
  assert c.entropy_coefficient == 0.001
  assert (c.learner.minibatch, c.learner.epochs) == (32, 1)
  assert (c.rollout.temperature, c.eval.temperature) == (1.0, 0.5)
  assert c.eval.every == 10


def test_unknown_config_argument_is_refused_with_the_allowed_ones():
  with pytest.raises(errors.UsageError, match='size, algo, weights'):
    presets.arguments('depth=3')
  with pytest.raises(errors.UsageError, match='tiny, 0.5b'):
    presets.arguments('size=9b')


def test_turn_level_estimator_pools_the_ratio_of_a_turn():
  assert load('quickstart', 'algo=ppo').learner.ratio == 'token'
  c = load('quickstart', 'algo=ppo,estimator=turn_gae')
  assert (c.advantage.estimator, c.learner.ratio) == ('turn_gae', 'turn')


# --- Rules -------------------------------------------------------------------

CAPPED = {'learner.old_logprob': 'sampler', 'learner.importance_cap': 2.0}
ALL_GROUPS = {'selection.ratio': 1.0, 'selection.patience': 3}


@pytest.mark.parametrize(
  ('argument', 'changes', 'words'),
  [
    # Rows.
    ('', {'seed': -1}, ['seed is -1;', '0 or more']),
    ('', {'weights.alpha': 1.5}, ['weights.alpha is 1.5;', '0 to 1']),
    ('', {'weights.alpha': float('nan')}, ['weights.alpha is nan;', 'finite']),
    ('', {'rollout.no_such': 1}, ['rollout.no_such is not a field']),
    # Fields without effect.
    ('', {'advantage.gae.lam': 0.9}, ['advantage.gae.lam is 0.9', 'algo=ppo']),
    ('', {'critic.optimizer.b1': 0.5}, ['critic.optimizer.b1 is', 'algo=ppo']),
    ('', {'weights.share': 0.5}, ['is 0.5', 'weights.scheme=top_entropy']),
    (
      'weights=top_entropy',
      {'weights.alpha': 0.5},
      ['is 0.5', 'weights.scheme=action'],
    ),
    (
      'weights=downweight',
      {'weights.signal': 'nll'},
      ["weights.signal is 'nll'", 'weights.beta'],
    ),
    ('', {'weights.alpha_end': 1.0}, ['is 1.0', 'weights.schedule_steps']),
    ('', {'weights.schedule_steps': 9}, ['is 9', 'weights.alpha_end']),
    ('', {'kl.estimator': 'k3'}, ["is 'k3'", 'kl.coefficient']),
    ('algo=ppo', ALL_GROUPS, ['selection.patience is 3', 'algo=grpo']),
    ('', CAPPED, ['learner.importance_cap is 2.0', 'old_logprob=rescore']),
    ('', {'model.revision': 'v1'}, ["model.revision is 'v1'", 'model.path']),
    ('', {'env.time_limit': 2.0}, ['env.time_limit is 2.0', 'env.threads']),
    # Rules between fields.
    (
      'algo=ppo',
      {'advantage.estimator': 'gigpo'},
      ["is 'gigpo' with algo=ppo", 'auto, gae, turn_gae'],
    ),
    ('algo=ppo', {'critic.warmup': 80}, ['critic.warmup is 80', 'num_steps']),
    ('', {'rollout.members': 1}, ['rollout.members is 1', '2 or more']),
    ('', {'learner.minibatch': 5}, ['learner.minibatch is 5', '64 kept']),
    ('', {'learner.microbatch': 5}, ['learner.microbatch is 5', '32']),
    ('', {'rollout.lengths': (512, 384)}, ['rollout.lengths is (512, 384)']),
    ('', {'rollout.lengths': (128, 256)}, ['is (128, 256)', '512']),
    ('', {'eval.first_seed': 9990}, ['eval.first_seed is 9990', '9968']),
    ('', {'warm_start.num_heads': 5}, ['num_heads is 5', '128']),
    ('', {'warm_start.num_key_value_heads': 3}, ['is 3', 'num_heads, 4']),
    ('', {'mesh.fsdp': -1}, ['mesh.data and mesh.fsdp are both -1']),
    ('', {'mesh.dcn_fsdp': -1}, ['mesh.dcn_data and mesh.dcn_fsdp are']),
    ('', {'mesh.dcn_fsdp': 0}, ['mesh.dcn_fsdp is 0', '-1 (the rest)']),
    ('', {'mesh.fsdp': 3}, ['members is 128', 'multiples of 3', 'of 2, 4, 8.']),
  ],
)
def test_bad_config_is_refused_with_field_value_and_allowed(
  argument, changes, words
):
  c = load('quickstart', argument)
  c.unlock()
  with pytest.raises(errors.UsageError) as error:
    validate.check(change(c, changes))
  assert '\n' not in str(error.value)
  for word in words:
    assert word in str(error.value)


@pytest.mark.parametrize(
  ('env', 'field', 'value', 'words'),
  [
    ('sokoban', 'env.options.rows', 2, '3 to 32'),
    ('sokoban', 'limits.turns', 0, '1 or more'),
    ('sokoban', 'env.boards', 'none.txt', 'a file of boards'),
    ('sudoku', 'env.options.size', 5, '4, 9'),
    ('sudoku', 'env.options.blanks', 17, 'more than the 16 actions'),
    (BOTH, 'mixture.sokoban.options.rows', 2, '3 to 32'),
    (BOTH, 'mixture.sokoban.player.options.skill', 2.0, '0 to 1'),
    (BOTH, 'mixture.sokoban.share', 0.0, 'above 0'),
    (BOTH, 'mixture.sokoban.action_budget', 0, '1 or more'),
    (BOTH, 'limits.turns', 7, 'section mixture.LABEL'),
    (BOTH, 'env.boards', __file__, 'section mixture.LABEL'),
    (BOTH, 'player.name', 'careful', 'section mixture.LABEL'),
  ],
)
def test_bad_field_of_an_environment_is_refused(env, field, value, words):
  c = change(schema.defaults(env), {field: value})
  with pytest.raises(errors.UsageError) as error:
    validate.check(c)
  assert str(error.value).startswith(f'{field} is {value!r}')
  assert words in str(error.value)


@pytest.mark.parametrize(
  ('argument', 'changes'),
  [
    ('algo=ppo', {'advantage.gae.lam': 0.9, 'critic.warmup': 79}),
    ('algo=ppo', {'weights.alpha_end': 1.0, 'weights.schedule_steps': 9}),
    ('algo=ppo', {'kl.coefficient': 0.1, 'kl.estimator': 'k3'}),
    ('algo=ppo', {'selection.patience': 3, 'learner.importance_cap': 2.0}),
    ('weights=top_entropy', {'weights.share': 0.5}),
    ('', {'model.path': 'acme/model', 'model.revision': 'v1'}),
    ('', {'env.threads': 2, 'env.time_limit': 2.0, 'loss.dual_clip': 0.0}),
  ],
)
def test_same_fields_pass_where_they_have_an_effect(argument, changes):
  validate.check(change(load('quickstart', argument), changes))


def test_boards_may_be_in_the_home_directory(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  (tmp_path / 'levels.txt').write_text('')
  validate.check(
    change(schema.defaults('sokoban'), {'env.boards': '~/levels.txt'})
  )


# --- Numbers that follow from a config ---------------------------------------


def test_known_shards_count_open_sizes_as_one():
  c = load('quickstart')
  assert validate.known_shards(c) == 1
  c.mesh.update(data=2, fsdp=-1, dcn_data=-1, dcn_fsdp=2)
  validate.check(c)
  assert validate.known_shards(c) == 4
  c.mesh.dcn_fsdp = 3
  with pytest.raises(errors.UsageError, match='members is 128.*multiples of 6'):
    validate.check(c)


def test_kept_rows_round_up_and_top_p_keeps_all():
  c = load('quickstart')
  assert validate.kept_rows(c) == 64
  c.selection.ratio = 0.3  # of 8 groups: 2.4, so 3
  assert validate.kept_rows(c) == 3 * 16
  c.selection.rule = 'top_p'
  assert validate.kept_rows(c) == 128
