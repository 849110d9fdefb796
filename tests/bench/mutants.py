"""Break 40 lines of the package, one at a time: the tests must notice.

Each mutant is one replacement in one file. It is applied to a copy of the
working tree, the tests of its room run there, and the first failing test is
recorded. A mutant that no test notices has survived. The table of results,
tests/bench/mutants.txt, keeps the rows of mutants that a call leaves out.

  python tests/bench/mutants.py
  python tests/bench/mutants.py --only=learner,temperature_upside_down
  python tests/bench/mutants.py --check

When a module moves, change its line in FILES; when a test file moves, its line
in TESTS.
"""

import argparse
import concurrent.futures
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[2]
TABLE = ROOT / 'tests' / 'bench' / 'mutants.txt'
TIME_LIMIT = 300.0  # seconds for the tests of one mutant
NOT_COPIED = ('.git', '.venv*', '__pycache__', '.*_cache', 'runs', 'models')

FILES = {
  'advantages': 'actfocus_jax/algorithm/advantages.py',
  'estimators': 'actfocus_jax/algorithm/estimators.py',
  'losses': 'actfocus_jax/algorithm/losses.py',
  'selection': 'actfocus_jax/algorithm/selection.py',
  'signals': 'actfocus_jax/algorithm/signals.py',
  'trajectory': 'actfocus_jax/algorithm/trajectory.py',
  'weights': 'actfocus_jax/algorithm/weights.py',
  'microbatch': 'actfocus_jax/learner/microbatch.py',
  'prepare': 'actfocus_jax/learner/prepare.py',
  'self_check': 'actfocus_jax/learner/self_check.py',
  'state': 'actfocus_jax/learner/state.py',
  'train_step': 'actfocus_jax/learner/train_step.py',
  'episode': 'actfocus_jax/rollout/episode.py',
  'host_slots': 'actfocus_jax/rollout/host_slots.py',
  'collector': 'actfocus_jax/rollout/collector.py',
  'sampling': 'actfocus_jax/rollout/sampling.py',
  'chat': 'actfocus_jax/text/chat.py',
  'template': 'actfocus_jax/text/template.py',
  'vocabulary': 'actfocus_jax/text/vocabulary.py',
  'attention': 'actfocus_jax/model/attention.py',
  'scoring': 'actfocus_jax/model/scoring.py',
}

TESTS = {
  'algorithm': ('tests/algorithm',),
  'train_step': (
    'tests/learner/test_train_step.py',
    'tests/learner/test_gradient.py',
    'tests/learner/test_ppo.py',
  ),
  'from_config': ('tests/learner/test_from_config.py',),
  'rows': ('tests/learner/test_rows.py',),
  'self_check': ('tests/learner/test_self_check.py',),
  'state': ('tests/learner/test_state.py',),
  'episode': ('tests/rollout/test_episode.py',),
  'rollout': (
    'tests/rollout/test_host_slots.py',
    'tests/rollout/test_rollout.py',
    'tests/rollout/test_sampling.py',
  ),
  'chat': ('tests/text/test_chat.py', 'tests/text/test_spans.py'),
  'template': ('tests/text/test_template.py',),
  'vocabulary': ('tests/text/test_vocabulary.py',),
  'attention': (
    'tests/model/test_attention.py',
    'tests/model/test_transformer.py',
  ),
  'scoring': ('tests/model/test_scoring.py', 'tests/model/test_critic.py'),
}


class Mutant(NamedTuple):
  """One broken line.

  Attributes:
    name: name of the fault.
    room: group of mutants, for `--only`.
    file: key of FILES.
    old: text that occurs exactly once in the file.
    new: text that replaces it.
    tests: keys of TESTS; their tests run, in this order.
  """

  name: str
  room: str
  file: str
  old: str
  new: str
  tests: tuple[str, ...]

  @property
  def path(self) -> str:
    """Path of the file from the root of the tree."""
    return FILES[self.file]


class Outcome(NamedTuple):
  """Result of a mutant: one row of the table.

  Attributes:
    mutant: name of the mutant.
    path: file that was changed.
    verdict: 'caught' or 'survived'.
    seconds: wall time of the tests, up to the first failure.
    commit: commit of the tree, with a '+' where files differ from it.
    test: first failing test, or a remark.
  """

  mutant: str
  path: str
  verdict: str
  seconds: str
  commit: str
  test: str


MUTANTS = (
  # --- algorithm -------------------------------------------------------------
  Mutant(
    'clip_takes_the_larger_surrogate',
    'algorithm',
    'losses',
    'jnp.minimum(free_BT, clipped_BT)',
    'jnp.maximum(free_BT, clipped_BT)',
    ('algorithm',),
  ),
  Mutant(
    'dual_clip_on_positive_advantages',
    'algorithm',
    'losses',
    'jnp.where(advantage_BT < 0, dual_clip',
    'jnp.where(advantage_BT > 0, dual_clip',
    ('algorithm',),
  ),
  Mutant(
    'k3_of_the_other_divergence',
    'algorithm',
    'losses',
    'jnp.expm1(-d_BT) + d_BT',
    'jnp.expm1(d_BT) - d_BT',
    ('algorithm',),
  ),
  Mutant(
    'sequence_mean_counts_columns',
    'algorithm',
    'losses',
    'jnp.any(weight_BT > 0, axis=1)',
    'jnp.any(weight_BT > 0, axis=0)',
    ('algorithm',),
  ),
  Mutant(
    'z_score_over_all_sampled_tokens',
    'algorithm',
    'weights',
    'masked_moments(signal_BT, action_BT)',
    'masked_moments(signal_BT, sampled_BT)',
    ('algorithm',),
  ),
  Mutant(
    'weights_receive_a_gradient',
    'algorithm',
    'weights',
    'return jax.lax.stop_gradient(weight_BT)',
    'return weight_BT',
    ('algorithm',),
  ),
  Mutant(
    'energy_of_the_other_sign',
    'algorithm',
    'signals',
    'return -logsumexp_BT',
    'return logsumexp_BT',
    ('algorithm',),
  ),
  Mutant(
    'biased_standard_deviation_of_a_group',
    'algorithm',
    'selection',
    'max(return_PG.shape[1] - 1, 1)',
    'max(return_PG.shape[1], 1)',
    ('algorithm',),
  ),
  Mutant(
    'whitening_over_padding',
    'algorithm',
    'advantages',
    'masked_moments(advantage_BT, sampled_BT)',
    'masked_moments(advantage_BT, jnp.ones_like(sampled_BT))',
    ('algorithm',),
  ),
  Mutant(
    'gae_reads_values_of_observations',
    'algorithm',
    'advantages',
    'jnp.where(sampled_B, value_B, later_value_B)',
    'value_B',
    ('algorithm',),
  ),
  Mutant(
    'masked_sum_multiplies_by_the_mask',
    'algorithm',
    'trajectory',
    'x_BT = jnp.where(mask_BT, x_BT.astype(jnp.float32), 0.0)',
    'x_BT = x_BT.astype(jnp.float32) * mask_BT.astype(jnp.float32)',
    ('algorithm',),
  ),
  Mutant(
    'clarity_bonus_of_the_turn_before',
    'algorithm',
    'estimators',
    'jnp.pad(clarity_BK[:, 1:], ((0, 0), (0, 1)))',
    'jnp.pad(clarity_BK[:, :-1], ((0, 0), (1, 0)))',
    ('algorithm',),
  ),
  # --- learner ---------------------------------------------------------------
  Mutant(
    'mean_per_micro_batch',
    'learner',
    'train_step',
    'policy = trajectory.divide(policy_sum, policy_count)',
    'share = part.weight_BT.shape[0] / minibatch.weight_BT.shape[0]\n'
    '    policy = share * trajectory.divide(\n'
    '      policy_sum,\n'
    '      losses.denominator(\n'
    '        part.weight_BT, reduction=config.loss["reduction"]\n'
    '      ),\n'
    '    )',
    ('train_step',),
  ),
  Mutant(
    'reference_is_the_current_policy',
    'learner',
    'train_step',
    'score(reference, batch, ref_mask_BT)',
    'score(state.actor.params, batch, ref_mask_BT)',
    ('train_step',),
  ),
  Mutant(
    'critic_warm_up_counts_skipped_steps',
    'learner',
    'train_step',
    'state.step - state.skipped >= ',
    'state.step >= ',
    ('train_step',),
  ),
  Mutant(
    'skipped_step_moves_the_moments',
    'learner',
    'train_step',
    'functools.partial(jnp.where, moves), new_opt_state',
    'lambda new, old: new, new_opt_state',
    ('train_step',),
  ),
  Mutant(
    'every_epoch_in_the_same_order',
    'learner',
    'train_step',
    'jax.random.fold_in(key, index)',
    'key',
    ('train_step', 'from_config'),
  ),
  Mutant(
    'kl_reads_reference_at_actions_only',
    'learner',
    'prepare',
    'batch.sampled if has_kl else batch.action',
    'batch.action',
    ('train_step', 'from_config'),
  ),
  Mutant(
    'joined_rows_in_another_order',
    'learner',
    'microbatch',
    'rows.swapaxes(0, 1).reshape(-1, *x.shape[2:])',
    'rows.reshape(-1, *x.shape[2:])',
    ('rows',),
  ),
  Mutant(
    'self_check_changes_no_padding',
    'learner',
    'self_check',
    'jnp.where(batch.valid, batch.tokens, 1)',
    'batch.tokens',
    ('self_check',),
  ),
  Mutant(
    'weight_decay_of_norms',
    'learner',
    'state',
    'x.ndim - is_stacked >= 2',
    'x.ndim >= 2',
    ('state',),
  ),
  # --- rollout ---------------------------------------------------------------
  Mutant(
    'compaction_keeps_idle_slots',
    'rollout',
    'collector',
    'np.argsort(~live_SN',
    'np.argsort(live_SN',
    ('rollout',),
  ),
  Mutant(
    'draws_depend_on_the_slot',
    'rollout',
    'sampling',
    'jax.vmap(sample)(row_B, position_B',
    'jax.vmap(sample)(jnp.arange(row_B.shape[0]), position_B',
    ('rollout',),
  ),
  Mutant(
    'stop_id_ends_no_turn_on_the_device',
    'rollout',
    'sampling',
    'jnp.where(live_B & ~stop_B, slots.budget_B - 1, 0)',
    'jnp.where(live_B, slots.budget_B - 1, 0)',
    ('rollout',),
  ),
  Mutant(
    'temperature_upside_down',
    'rollout',
    'sampling',
    'model.unembed(hidden_B1D[:, 0]) / temperature',
    'model.unembed(hidden_B1D[:, 0]) * temperature',
    ('rollout',),
  ),
  Mutant(
    'observation_one_position_late',
    'rollout',
    'sampling',
    'model.extend(fed_MT, length_M - 1, part',
    'model.extend(fed_MT, length_M, part',
    ('rollout',),
  ),
  Mutant(
    'cache_view_forgets_the_current_turn',
    'rollout',
    'host_slots',
    '(self.length_B + self.count_B)[self.live_B]',
    'self.length_B[self.live_B]',
    ('rollout',),
  ),
  Mutant(
    'stop_token_is_not_trained',
    'rollout',
    'episode',
    'batch.sampled[row, span] = True',
    'batch.sampled[row, turn.start : turn.stop - 1] = True',
    ('episode', 'rollout'),
  ),
  Mutant(
    'anchor_is_the_state_after_the_turn',
    'rollout',
    'episode',
    'anchor_of(self.text)',
    'anchor_of(result.text)',
    ('episode', 'rollout'),
  ),
  Mutant(
    'turn_begins_without_room_for_an_id',
    'rollout',
    'episode',
    'if len(self.ids) + len(ids) >= self._limits.context:',
    'if len(self.ids) + len(ids) > self._limits.context:',
    ('episode', 'rollout'),
  ),
  # --- text ------------------------------------------------------------------
  Mutant(
    'action_mask_wider_by_a_byte',
    'text',
    'chat',
    'np.minimum(ends, stop) > np.maximum(begins, start)',
    'np.minimum(ends, stop) >= np.maximum(begins, start)',
    ('chat',),
  ),
  Mutant(
    'another_stop_id_closes_a_turn',
    'text',
    'chat',
    'ids[1:] if last_id == self._close_id else ids',
    'ids[1:] if last_id in self.stop_ids else ids',
    ('chat', 'episode'),
  ),
  Mutant(
    'environment_text_makes_special_tokens',
    'text',
    'chat',
    'self._texts.between(self._harmless(user))',
    'self._texts.between(user)',
    ('chat', 'episode'),
  ),
  Mutant(
    'special_ids_have_bytes',
    'text',
    'vocabulary',
    'if index not in special:\n      pieces[index] = bytes_of(token)',
    'pieces[index] = (\n'
    '      token.encode() if index in special else bytes_of(token)\n    )',
    ('vocabulary', 'chat'),
  ),
  Mutant(
    'plain_increment_begins_with_a_space',
    'text',
    'template',
    'return text.lstrip() if self._is_plain else text',
    'return text',
    ('template', 'chat'),
  ),
  # --- scoring ---------------------------------------------------------------
  Mutant(
    'token_predicts_itself',
    'scoring',
    'scoring',
    'target_BT = tokens_BT[:, 1:]',
    'target_BT = tokens_BT[:, :-1]',
    ('scoring',),
  ),
  Mutant(
    'value_sees_its_own_token',
    'scoring',
    'scoring',
    'model.value(model.hidden(tokens_BT)[:, :-1])',
    'model.value(model.hidden(tokens_BT)[:, 1:])',
    ('scoring',),
  ),
  Mutant(
    'last_piece_of_marked_tokens_is_lost',
    'scoring',
    'scoring',
    '-(-count // width)',
    'count // width',
    ('scoring',),
  ),
  Mutant(
    'causal_mask_with_heads_and_queries_swapped',
    'scoring',
    'attention',
    'jnp.tile(jnp.arange(S - T, S), G)',
    'jnp.repeat(jnp.arange(S - T, S), G)',
    ('attention',),
  ),
  Mutant(
    'decoding_query_misses_its_own_key',
    'scoring',
    'attention',
    'jnp.arange(S)[None, :] <= position_BT)',
    'jnp.arange(S)[None, :] < position_BT)',
    ('attention',),
  ),
)


def main() -> int:
  """Runs the chosen mutants; 0 when all of them were caught."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--only', default='', help='rooms and names: A,B,...')
  parser.add_argument('--list', action='store_true', help='print the mutants')
  parser.add_argument(
    '--check', action='store_true', help='only check that each still applies'
  )
  parser.add_argument('--jobs', type=int, default=1, help='mutants at a time')
  parser.add_argument(
    '--no_baseline',
    action='store_true',
    help='do not run the tests on the unbroken tree first',
  )
  args = parser.parse_args()
  chosen = choose(args.only)
  if args.list:
    for mutant in chosen:
      print(f'{mutant.room:<10} {mutant.name:<44} {mutant.path}')
    return 0
  check(chosen)
  if args.check:
    print(f'{len(chosen)} mutants apply.')
    return 0
  if not args.no_baseline:
    check_baseline(chosen)
  commit = commit_of_tree()
  outcomes = read_table()
  with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
    runs = [pool.submit(run, mutant, commit) for mutant in chosen]
    for done in concurrent.futures.as_completed(runs):
      outcome = done.result()
      outcomes[outcome.mutant] = outcome
      write_table(outcomes)
      print(*outcome, sep='  ', flush=True)
  verdicts = [outcomes[mutant.name].verdict for mutant in chosen]
  print(f'{verdicts.count("caught")} of {len(verdicts)} caught.')
  return int('survived' in verdicts)


def choose(only: str) -> list[Mutant]:
  """Returns the mutants of some rooms or names, all of them for ''."""
  assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
  wanted = {word for word in only.split(',') if word}
  unknown = wanted - {word for m in MUTANTS for word in (m.name, m.room)}
  if unknown:
    raise SystemExit(f'--only names no room and no mutant: {sorted(unknown)}.')
  return [m for m in MUTANTS if not wanted or {m.name, m.room} & wanted]


def check(mutants: Sequence[Mutant]):
  """Exits unless each mutant changes exactly one place and its tests exist."""
  problems = []
  for mutant in mutants:
    path = ROOT / mutant.path
    count = path.read_text().count(mutant.old) if path.is_file() else 0
    if count != 1:
      problems.append(
        f'{mutant.name}: {mutant.old!r} occurs {count} times in {mutant.path}'
      )
    problems += [
      f'{mutant.name}: there is no {test}'
      for test in tests_of([mutant])
      if not (ROOT / test).exists()
    ]
  if problems:
    raise SystemExit('\n'.join(problems))


def tests_of(mutants: Sequence[Mutant]) -> list[str]:
  """Returns the test paths of some mutants, each once, in their order."""
  paths = [
    path for mutant in mutants for key in mutant.tests for path in TESTS[key]
  ]
  return list(dict.fromkeys(paths))


def check_baseline(mutants: Sequence[Mutant]):
  """Exits unless the tests of each room pass on the unbroken tree."""
  for room in dict.fromkeys(mutant.room for mutant in mutants):
    tests = tests_of([mutant for mutant in mutants if mutant.room == room])
    begin = time.monotonic()
    # A room has the tests of several mutants: none may fail, all may be slow.
    failure = first_failure(None, tests, time_limit=5 * TIME_LIMIT)
    seconds = time.monotonic() - begin
    if failure is not None:
      raise SystemExit(f'{room}: fails without a mutant: {failure}')
    print(f'{room}: passes without a mutant in {seconds:.0f} s', flush=True)


def run(mutant: Mutant, commit: str) -> Outcome:
  """Runs the tests of a mutant."""
  begin = time.monotonic()
  failure = first_failure(mutant, tests_of([mutant]), time_limit=TIME_LIMIT)
  seconds = time.monotonic() - begin
  verdict = 'survived' if failure is None else 'caught'
  return Outcome(
    mutant.name, mutant.path, verdict, f'{seconds:.0f}', commit, failure or '-'
  )


def first_failure(
  mutant: Mutant | None, tests: Sequence[str], *, time_limit: float
) -> str | None:
  """Runs tests in a copy of the tree.

  Args:
    mutant: change to the copy, or None.
    tests: paths of tests.
    time_limit: seconds after which the tests are stopped.

  Returns:
    The first failing test, or None where all pass.

  Raises:
    SystemExit: pytest ran no test.
  """
  with tempfile.TemporaryDirectory() as folder:
    tree = pathlib.Path(folder) / 'tree'
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*NOT_COPIED))
    if mutant is not None:
      path = tree / mutant.path
      path.write_text(path.read_text().replace(mutant.old, mutant.new))
    options = ('-x', '-q', '-p', 'no:cacheprovider')
    with subprocess.Popen(
      (sys.executable, '-m', 'pytest', *options, *tests),
      cwd=tree,
      env=os.environ | {'PYTHONPATH': str(tree)},
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      start_new_session=True,
    ) as process:
      try:
        output, _ = process.communicate(timeout=time_limit)
      except subprocess.TimeoutExpired:
        return f'stopped after {time_limit:g} s'
      finally:
        # Also processes that a test has started.
        if process.poll() is None:
          os.killpg(process.pid, signal.SIGKILL)
  if process.returncode == 0:
    return None
  failed = re.search(r'^(?:FAILED|ERROR) (.+?)(?: - |$)', output, re.MULTILINE)
  if failed is None:
    raise SystemExit(f'pytest failed without a failing test:\n{output[-2000:]}')
  return failed[1]


# --- The table ---------------------------------------------------------------


def commit_of_tree() -> str:
  """Returns the short hash, with a '+' where package or tests differ."""

  def git(*words: str) -> str:
    done = subprocess.run(
      ('git', *words), cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()

  changed = git('status', '--porcelain', '--', '.', ':!tests/bench')
  return git('rev-parse', '--short', 'HEAD') + ('+' if changed else '')


def read_table() -> dict[str, Outcome]:
  """Returns the rows of the table by mutant."""
  if not TABLE.is_file():
    return {}
  lines = TABLE.read_text().splitlines()
  rows = [re.split(r'\s{2,}', line, maxsplit=5) for line in lines]
  outcomes = [Outcome(*row) for row in rows if len(row) == 6]
  return {outcome.mutant: outcome for outcome in outcomes}


def write_table(outcomes: dict[str, Outcome]):
  """Writes the table, in the order of MUTANTS."""
  rows = [outcomes[m.name] for m in MUTANTS if m.name in outcomes]
  caught = sum(row.verdict == 'caught' for row in rows)
  head = Outcome(*Outcome._fields)
  widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
  lines = [
    '  '.join(
      cell.ljust(width) for cell, width in zip(row, widths, strict=True)
    ).rstrip()
    for row in (head, *rows)
  ]
  first = f'{caught} of {len(rows)} mutants caught (tests/bench/mutants.py)'
  TABLE.write_text('\n'.join([first, '', *lines, '']))


if __name__ == '__main__':
  sys.exit(main())
