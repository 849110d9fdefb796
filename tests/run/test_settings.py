"""The config: what it refuses, how it is written down, what may change."""

import importlib.util
import pathlib

import pytest

from actfocus_jax.config import presets, resume, schema, validate

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIGS = sorted(path.stem for path in (ROOT / 'configs').glob('*.py'))


def load(name: str, argument: str | None = None):
  path = ROOT / 'configs' / f'{name}.py'
  spec = importlib.util.spec_from_file_location(name, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(argument)


@pytest.mark.parametrize('name', CONFIGS)
@pytest.mark.parametrize('size', ['tiny', *presets.MODELS])
@pytest.mark.parametrize('weights', schema.WEIGHTS)
@pytest.mark.parametrize('algo', schema.ALGOS)
def test_every_config_passes_its_own_checks(name, size, weights, algo):
  c = load(name, f'size={size},weights={weights},algo={algo}')
  validate.check(c)
  assert c.is_locked and c.algo == algo
  chosen = schema.WEIGHTS[weights]
  default = schema.defaults().weights.to_dict()
  assert c.weights.to_dict() == default | chosen
  assert bool(c.model.path) == (size != 'tiny')


@pytest.mark.parametrize('name', CONFIGS)
def test_every_config_says_its_command(name):
  text = (ROOT / 'configs' / f'{name}.py').read_text()
  assert f'--config=configs/{name}.py' in text.partition('def ')[0]


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
def test_paper_settings(name, algo):
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


def test_written_config_reads_back_the_same():
  c = load('quickstart')
  flat = schema.to_json(c)
  again = schema.from_json(flat)
  assert schema.to_json(again) == flat
  assert again.env.options.success_probability == 1.0
  assert tuple(again.rollout.lengths) == tuple(c.rollout.lengths)
  with pytest.raises(ValueError, match='no_such'):
    schema.from_json(flat | {'rollout.no_such': 1})


def test_what_may_change_when_a_run_goes_on():
  c = load('quickstart')
  old = schema.to_json(c)
  with c.unlocked():
    c.num_steps += 100
    c.eval.every = 3
    c.checkpoint.keep = 7
    c.mesh.data = 1
  assert resume.difference(old, c) is None
  c.weights.alpha = 0.2
  found = resume.difference(old, c)
  assert found == 'weights.alpha was 0.1 and is now 0.2'


def test_eval_boards_may_not_change_in_a_run():
  c = load('quickstart')
  old = schema.to_json(c)
  c.eval.prompts = 8
  assert 'eval.prompts' in resume.difference(old, c)


def test_batches_that_do_not_divide():
  c = load('quickstart')
  c.learner.microbatch = 5
  with pytest.raises(ValueError, match='learner.microbatch is 5.*32'):
    validate.check(c)
  c = load('quickstart')
  with pytest.raises(
    ValueError,
    match='rollout.members is 128.*multiples of 3, or mesh.* of 2, 4, 8.',
  ):
    validate.check_mesh(c, 3)


def test_sizes_of_the_mesh():
  """-1 once inside a slice and once over slices; all others count for rows."""
  c = load('quickstart')
  assert validate.known_shards(c) == 1
  c.mesh.update(data=2, fsdp=-1, dcn_data=-1, dcn_fsdp=2)
  validate.check(c)
  assert validate.known_shards(c) == 4
  c.mesh.dcn_fsdp = 3
  with pytest.raises(ValueError, match='members is 128.*multiples of 6'):
    validate.check(c)
  c.mesh.update(data=-1, dcn_fsdp=1)
  with pytest.raises(ValueError, match='mesh.data and mesh.fsdp are both -1'):
    validate.check(c)
  c.mesh.update(data=1, dcn_fsdp=-1)
  with pytest.raises(ValueError, match='mesh.dcn_data and mesh.dcn_fsdp are'):
    validate.check(c)
  c.mesh.update(dcn_fsdp=0)
  with pytest.raises(ValueError, match='mesh.dcn_fsdp is 0; allowed: -1'):
    validate.check(c)


def test_lengths_must_rise_to_the_context():
  c = load('quickstart')
  c.rollout.lengths = (512, 384)
  with pytest.raises(ValueError, match='rollout.lengths'):
    validate.check(c)
  c.rollout.lengths = (128, 256)
  with pytest.raises(ValueError, match='512'):
    validate.check(c)


def test_kept_rows_rounds_up_as_selection_does():
  c = load('quickstart')
  c.selection.ratio = 0.3  # of 8 groups: 2.4, so 3
  assert validate.kept_rows(c) == 3 * 16


def test_unknown_argument_names_the_allowed_ones():
  with pytest.raises(ValueError, match='size, algo, weights'):
    presets.arguments('depth=3')
  with pytest.raises(ValueError, match='tiny, 0.5b'):
    presets.arguments('size=9b')


def test_numbers_that_nobody_reads_are_refused():
  c = load('quickstart')
  c.advantage.gae.lam = 0.9
  with pytest.raises(
    ValueError, match='advantage.gae.lam is 0.9, but algo is grpo and'
  ):
    validate.check(c)
  c = load('quickstart', 'algo=ppo')
  c.advantage.gae.lam = 0.9
  validate.check(c)
  c.advantage.estimator = 'gigpo'
  with pytest.raises(ValueError, match="is 'gigpo'; allowed with algo ppo: au"):
    validate.check(c)
  c = load('quickstart')
  c.critic.optimizer.learning_rate = 1e-3
  with pytest.raises(
    ValueError, match='critic.optimizer.learning_rate is 0.001.*have none'
  ):
    validate.check(c)


@pytest.mark.parametrize(
  ('changes', 'reads'),
  [
    ({}, True),
    ({'weights.beta': 0.0}, False),
    (
      {
        'weights.beta': 0.0,
        'weights.beta_end': 0.5,
        'weights.schedule_steps': 9,
      },
      True,
    ),
    ({'weights.signal': 'nll'}, False),
    ({'weights.signal': 'random'}, False),
    ({'weights.signal': 'logprob_shift'}, True),
    ({'weights.scheme': 'top_entropy'}, False),
    ({'weights.scheme': 'top_entropy', 'kl.coefficient': 0.1}, True),
  ],
)
def test_who_asks_the_reference(changes, reads):
  c = load('quickstart')
  for field, value in changes.items():
    section, name = field.split('.')
    c[section][name] = value
  validate.check(c)
  assert schema.has_reference(c) == reads


def test_top_p_keeps_all_rows_for_the_mini_batches():
  c = load('quickstart')
  assert validate.kept_rows(c) == 64
  c.selection.rule = 'top_p'
  assert validate.kept_rows(c) == 128


@pytest.mark.parametrize(
  ('argument', 'changes', 'field'),
  [
    ('', {'weights.share': 0.5}, 'weights.share'),
    ('weights=top_entropy', {'weights.alpha': 0.5}, 'weights.alpha'),
    ('weights=top_entropy', {'weights.signal': 'nll'}, 'weights.signal'),
    ('weights=downweight', {'weights.signal': 'nll'}, 'weights.signal'),
    ('', {'weights.alpha_end': 1.0}, 'weights.alpha_end'),
    ('', {'weights.schedule_steps': 9}, 'weights.schedule_steps'),
    ('', {'kl.estimator': 'k3'}, 'kl.estimator'),
    ('algo=ppo', {'selection.ratio': 1.0, 'selection.patience': 3}, 'patience'),
    (
      '',
      {'learner.old_logprob': 'sampler', 'learner.importance_cap': 2.0},
      'learner.importance_cap',
    ),
    ('algo=ppo', {'critic.warmup': 80}, 'critic.warmup'),
  ],
)
def test_numbers_that_would_change_nothing_are_refused(
  argument, changes, field
):
  c = load('quickstart', argument)
  for name, value in changes.items():
    section, _, leaf = name.rpartition('.')
    schema.get(c, section)[leaf] = value
  with pytest.raises(ValueError, match=f'{field} is .*; allowed: ') as error:
    validate.check(c)
  assert '\n' not in str(error.value)


def test_the_same_numbers_where_they_are_read():
  c = load('quickstart', 'algo=ppo')
  c.weights.update(alpha_end=1.0, schedule_steps=9)
  c.kl.update(coefficient=0.1, estimator='k3')
  c.selection.patience = 3
  c.learner.importance_cap = 2.0
  c.critic.warmup = 79
  validate.check(c)
  c = load('quickstart', 'weights=top_entropy')
  c.weights.share = 0.5
  validate.check(c)


def test_turn_level_ppo_clips_the_turn():
  assert load('quickstart', 'algo=ppo').learner.ratio == 'token'
  c = load('quickstart', 'algo=ppo,estimator=turn_gae')
  assert (c.advantage.estimator, c.learner.ratio) == ('turn_gae', 'turn')
