"""Commands: bad input is one sentence and exit code 2; nothing is written."""

import json
import os
import re
import signal
import subprocess
import sys

import processes
import pytest
from command import ROOT, assert_refused, command, train

from actfocus_jax import build
from actfocus_jax.config import schema
from actfocus_jax.model import architecture

CONFIG_JSON = json.dumps(architecture.Config(96, 32, 48, 2, 4, 2, 8).to_hf())
QUICKSTART = '--config=configs/quickstart.py'


# Field and value, and what is allowed: what the one sentence must name.
REFUSED = {
  '--config.weights.alpa=0.2': ['weights.alpa', 'weights.alpha'],
  '--config.weights.alpha=1.5': ['weights.alpha', '1.5', '0 to 1'],
  '--config.weights.alpha=-0.1': ['weights.alpha', '-0.1', '0 to 1'],
  '--config.weights.alpha=nan': ['weights.alpha', 'nan'],
  '--config.weights.alpha=high': ['weights.alpha', 'high'],
  '--config.weights.beta=-1': ['weights.beta', '-1', '0 or more'],
  '--config.rollout.members=1': ['rollout.members', '1', '2 or more'],
  '--config.selection.ratio=0': ['selection.ratio', '0', 'above 0'],
  '--config.learner.minibatch=7': ['learner.minibatch', '7', '64'],
  '--config.env.name=chess': ['env.name', 'configs/own.py:env=NAME'],
  '--config.kl.coefficient=abc': ['kl.coefficient', 'abc'],
  '--config.loss.dual_clip=1': ['loss.dual_clip', '0 (off) or above 1'],
  '--config.algo=dqn': ['algo', 'dqn', 'grpo'],
  '--config.model.path=no/such/dir': ['model.path', 'no/such/dir'],
  '--config.model.revision=v1': ['model.revision', 'v1', 'model.path'],
  '--config.model.rendering=chatml': ['model.rendering', 'template, plain'],
  '--config.model.path=gpt2': ['model.path', 'gpt2', 'hub id'],
  '--config.loss.dual_clip=0.5': ['loss.dual_clip', '0.5', 'above 1'],
  '--config.warm_start.num_heads=5': ['warm_start.num_heads', '5', '128'],
  '--config.eval.first_seed=9990': ['eval.first_seed', '9990', '9968'],
  '--config.player.options.skill=7': ['player.options.skill', '7', '0 to 1'],
  '--config.env.options.size=3000': ['env.options.size', '3000', '2 to 16'],
  '--config.env.options.boxes=2': ['env.options.boxes', 'not a field'],
  '--config.mesh=2x4': ['mesh', '2x4', '--config.mesh.FIELD=value'],
  '--model_path=x': ['--model_path goes', '--config.model.path=DIR'],
  '--confg=x': ['confg'],
  'stray': ['stray'],
}


@pytest.mark.parametrize('argument', REFUSED)
def test_field_with_bad_value_refused(argument, tmp_path):
  workdir = tmp_path / 'run'
  assert_refused(train(workdir, argument), *REFUSED[argument])
  assert not workdir.exists()


def test_context_below_first_prompt_refused(tmp_path):
  workdir = tmp_path / 'run'
  result = train(
    workdir,
    '--config.limits.context=64',
    f'--config.warm_start.cache={tmp_path / "cache"}',
  )
  assert_refused(result, 'limits.context', '64', 'first prompt')
  assert not workdir.exists()
  assert not list(tmp_path.glob('cache/*/config.json'))


def test_episodes_not_divisible_by_mesh_refused(tmp_path):
  workdir = tmp_path / 'run'
  result = train(
    workdir,
    '--config.rollout.prompts=6',
    '--config.mesh.data=64',
    config='frozen_lake',
  )
  assert_refused(result, 'rollout.members', '96', '64')
  assert not workdir.exists()


def test_workdir_of_another_config_untouched(tmp_path):
  from actfocus_jax.config import schema

  snapshot = schema.to_json(schema.defaults()) | {'weights.alpha': 0.3}
  (tmp_path / 'config.json').write_text(json.dumps(snapshot))
  (tmp_path / '.lock').write_text('')
  before = (tmp_path / 'config.json').read_text()
  result = train(tmp_path)
  assert_refused(result, str(tmp_path), 'another config')
  assert (tmp_path / 'config.json').read_text() == before
  assert {p.name for p in tmp_path.iterdir()} == {'config.json', '.lock'}


def test_workdir_with_other_files_untouched(tmp_path):
  (tmp_path / 'thesis.tex').write_text('years of work')
  assert_refused(train(tmp_path), str(tmp_path), 'holds files but not a run')
  assert [p.name for p in tmp_path.iterdir()] == ['thesis.tex']


@pytest.mark.parametrize(
  ('broken', 'words'),
  [
    ({}, ['model.path', 'config.json']),
    ({'config.json': CONFIG_JSON}, ['model.path', 'tokenizer.json']),
    (
      {
        'config.json': '{"model_type": "llama"}',
        'tokenizer.json': '{}',
        'model.safetensors': '',
      },
      ['model.path', 'llama', 'qwen2'],
    ),
    (
      {
        'config.json': '{torn',
        'tokenizer.json': '{}',
        'model.safetensors': '',
      },
      ['config.json', 'cannot be read'],
    ),
  ],
)
def test_unreadable_model_directory_refused(broken, words, tmp_path):
  model, workdir = tmp_path / 'model', tmp_path / 'run'
  model.mkdir()
  for name, text in broken.items():
    (model / name).write_text(text)
  result = train(workdir, f'--config.model.path={model}')
  assert_refused(result, *words)
  assert not workdir.exists()


@pytest.mark.parametrize(
  ('name', 'content', 'words'),
  [
    (
      'model.safetensors',
      'version https://git-lfs.github.com/spec/v1',
      ['model.safetensors', 'git lfs pull'],
    ),
    ('tokenizer.json', '{"version": "1.', ['tokenizer.json', 'cannot be read']),
    ('tokenizer.json', '{}', ['tokenizer.json', 'no model']),
    (
      'model.safetensors',
      '\x20\0\0\0\0\0\0\0{"a": {"data_offsets": [0, 9]}}cut',
      ['model.safetensors', 'not a complete safetensors', 'cut?'],
    ),
  ],
)
def test_partial_download_refused(name, content, words, tmp_path):
  model, workdir = tmp_path / 'model', tmp_path / 'run'
  model.mkdir()
  (model / 'config.json').write_text(CONFIG_JSON)
  (model / 'tokenizer.json').write_text('{"model": {}}')
  (model / 'model.safetensors').write_bytes(b'\x02' + b'\0' * 7 + b'{}')
  (model / name).write_text(content)
  result = train(workdir, f'--config.model.path={model}')
  assert_refused(result, *words)
  assert not workdir.exists()


def test_hub_id_without_network_names_download(tmp_path):
  """A real size in the config, an empty cache: what to fetch, and where to."""
  offline = {'HF_HUB_OFFLINE': '1', 'HF_HOME': str(tmp_path / 'home')}
  workdir = tmp_path / 'run'
  result = command(
    'train',
    '--config=configs/sokoban.py:size=1.5b',
    f'--workdir={workdir}',
    **offline,
  )
  assert_refused(
    result,
    'model.path',
    'hf download Qwen/Qwen2.5-1.5B-Instruct',
    '--config.model.path=models/Qwen2.5-1.5B-Instruct',
  )
  assert not workdir.exists()


def test_partial_hub_cache_names_download(tmp_path):
  """Config and tokenizer were fetched once; the weights never were."""
  cached = tmp_path / 'home' / 'hub' / 'models--acme--part'
  snapshot = cached / 'snapshots' / ('a' * 40)
  snapshot.mkdir(parents=True)
  (cached / 'refs').mkdir()
  (cached / 'refs' / 'main').write_text('a' * 40)
  (snapshot / 'config.json').write_text(CONFIG_JSON)
  (snapshot / 'tokenizer.json').write_text('{"model": {}}')
  result = command(
    'train',
    '--config=configs/quickstart.py',
    f'--workdir={tmp_path / "run"}',
    '--config.model.path=acme/part',
    HF_HUB_OFFLINE='1',
    HF_HOME=str(tmp_path / 'home'),
  )
  assert_refused(result, 'acme/part', 'model.safetensors', 'hf download')
  assert not (tmp_path / 'run').exists()


def test_typo_in_config_file_refused(tmp_path):
  config = tmp_path / 'mine.py'
  config.write_text(
    'from actfocus_jax.config import schema\n'
    'def get_config():\n'
    '  c = schema.defaults()\n'
    '  c.rollout.memebers = 32\n'
    '  return c\n'
  )
  result = command('train', f'--config={config}', f'--workdir={tmp_path}/run')
  assert_refused(result, 'rollout.memebers', 'rollout.members')
  assert not (tmp_path / 'run').exists()


def test_config_as_next_argument_is_read(tmp_path):
  result = command('train', '--config', 'no.py', f'--workdir={tmp_path}/run')
  assert_refused(result, 'no.py')


def test_directory_that_cannot_be_made_refused(tmp_path):
  (tmp_path / 'file').write_text('')
  below = tmp_path / 'file' / 'run'
  assert_refused(train(below), '--workdir', str(below), 'cannot be made')
  out = f'--out={below}'
  result = command('warm_start', '--config=configs/quickstart.py', out)
  assert_refused(result, '--out', str(below), 'cannot be made')
  cache = f'--config.warm_start.cache={below}'
  assert_refused(train(tmp_path / 'run', cache), 'warm_start.cache')


def test_config_file_not_python_refused(tmp_path):
  result = command('train', '--config=README.md', f'--workdir={tmp_path}/run')
  assert_refused(result)


def test_evaluate_of_torn_config_json_refused(tmp_path):
  (tmp_path / 'config.json').write_text('{torn')
  result = command('evaluate', f'--workdir={tmp_path}')
  assert_refused(result, 'config.json', 'cannot be read')


@pytest.mark.slow
def test_sigint_in_warm_start_prints_one_line(tmp_path):
  process = subprocess.Popen(
    [
      sys.executable,
      *('-m', 'actfocus_jax.train', '--config=configs/quickstart.py'),
      f'--workdir={tmp_path}/run',
      f'--config.warm_start.cache={tmp_path}/cache',
      *('--config.warm_start.episodes=32', '--config.warm_start.batch=4'),
      *('--config.warm_start.steps=100000', '--config.eval.prompts=1'),
    ],
    cwd=ROOT,
    env={**os.environ, **processes.environment()},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  for line in process.stdout:
    if line.startswith('warm start 10/'):
      process.send_signal(signal.SIGINT)
      break
  out, err = process.communicate(timeout=60)
  assert process.returncode == 130
  assert 'Stopped by SIGINT during the warm start' in out
  assert 'Traceback' not in err
  assert not (tmp_path / 'run').exists()


def test_evaluate_step_without_workdir_refused():
  result = command('evaluate', '--config=configs/quickstart.py', '--step=50')
  assert_refused(result, '--step', '--workdir')


def test_missing_config_file_refused(tmp_path):
  result = train(tmp_path / 'run', config='no_such')
  assert_refused(result, 'configs/no_such.py')


def test_bad_config_argument_refused(tmp_path):
  result = command(
    'train',
    '--config=configs/quickstart.py:weights=heavy',
    f'--workdir={tmp_path / "run"}',
  )
  assert_refused(result, 'weights', 'heavy', 'actfocus')


def test_missing_required_flag_refused():
  assert_refused(command('train', '--config=configs/quickstart.py'), 'workdir')
  assert_refused(command('train', '--workdir=runs/x'), '--config')
  assert_refused(command('report'), '--workdir is missing')
  assert_refused(command('evaluate', '--workdir=no/such/run'), 'no/such/run')


@pytest.mark.parametrize(
  'module', ['train', 'evaluate', 'warm_start', 'report']
)
def test_help_shows_the_call(module):
  result = command(module, '--help')
  assert result.returncode == 0
  assert f'python -m actfocus_jax.{module}' in result.stdout


def test_dry_run_prints_work_and_memory(tmp_path):
  result = command(
    'train',
    '--config=configs/sokoban.py:algo=ppo,weights=uniform',
    '--dry_run',
    f'--workdir={tmp_path / "run"}',
  )
  assert result.returncode == 0, result.stderr
  for words in (
    "* algo = 'ppo'",
    'episodes: 128 (8 groups of 16)',
    'trajectories trained on: 64',
    'optimizer updates: 1 of 64',
    'frozen reference: not read',
    'critic: trained',
    'cache',
    'total',
    'model.dtype=auto counted as 2 bytes',
  ):
    assert words in result.stdout
  assert not (tmp_path / 'run').exists()
  bad = command('train', '--config=configs/sokoban.py:algo=dqn', '--dry_run')
  assert_refused(bad, 'algo', 'dqn', 'grpo')


@pytest.mark.parametrize(('size', 'algo'), [('0.5b', 'grpo'), ('7b', 'ppo')])
def test_dry_run_of_known_models_needs_no_download(size, algo, tmp_path):
  result = command(
    'train',
    f'--config=configs/sokoban.py:size={size},algo={algo}',
    '--dry_run',
    HF_HUB_OFFLINE='1',
    HF_HOME=str(tmp_path),
  )
  assert result.returncode == 0, result.stderr
  (total,) = re.findall(r'total +([0-9.]+)', result.stdout)
  assert float(total) > 15
  assert ('critic' in result.stdout) and 'Memory of one device' in result.stdout


def test_dry_run_reads_config_json_of_directory(tmp_path):
  model = tmp_path / 'model'
  model.mkdir()
  config = architecture.Config(96, 32, 48, 2, 4, 2, 8)
  (model / 'config.json').write_text(json.dumps(config.to_hf()))
  assert build.architecture_of(schema.defaults(), model) == config


def test_dry_run_mesh_uneven_batch_refused(tmp_path):
  result = command(
    'train',
    '--config=configs/sokoban.py:size=3b',
    '--config.mesh.fsdp=8',
    '--dry_run',
  )
  assert_refused(result, 'learner.microbatch', '4', 'multiples of 8')


def test_dry_run_mesh_uneven_model_refused(tmp_path):
  """Before any device: with all sizes fixed, the nearest shapes are known."""
  result = command(
    'train',
    '--config=configs/sokoban.py:size=0.5b',
    '--config.mesh.data=1',
    '--config.mesh.tensor=3',
    '--dry_run',
  )
  assert_refused(result, 'vocab_size', '151936', '3 equal parts', 'divisors')


def test_help_of_compare_exits_with_zero():
  result = command('compare', '--help')
  assert result.returncode == 0
  assert (
    'centered_energy' in result.stdout and 'quickstart.py \\\n' in result.stdout
  )


# --- Places -------------------------------------------------------------------


@pytest.mark.parametrize(
  ('module', 'arguments'),
  [
    ('train', [QUICKSTART]),
    ('compare', [QUICKSTART, '--arms=uniform,actfocus']),
    ('evaluate', []),
    ('export', ['--out=no/model']),
    ('play', []),
    ('report', []),
    ('report', ['--workdir=no/run', '--workdirs=a,s3://b/x']),
  ],
)
def test_workdir_of_unknown_scheme_refused_as_typed(module, arguments):
  flag = '--workdirs' if '--workdir=no/run' in arguments else '--workdir'
  result = command(module, '--workdir=s3://b/x', *arguments)
  assert_refused(
    result, f'{flag} is s3://b/x; allowed: a directory, or gs://BUCKET/FOLDER.'
  )
  assert not (ROOT / 's3:').exists()


@pytest.mark.parametrize(
  ('module', 'flag', 'arguments'),
  [
    ('train', '--config.warm_start.cache', ['--workdir=no/run', QUICKSTART]),
    ('train', '--config.warm_start.cache', ['--dry_run', QUICKSTART]),
    ('warm_start', '--out', [QUICKSTART]),
    ('export', '--out', ['--workdir=no/run']),
  ],
)
def test_bucket_for_local_directory_refused(module, flag, arguments):
  result = command(module, *arguments, f'{flag}=gs://b/x')
  assert_refused(
    result,
    f'{flag.removeprefix("--config.")} is gs://b/x; allowed: a directory on '
    'this machine.',
  )
  assert not (ROOT / 'gs:').exists()


def test_mesh_refused_before_model_is_fetched(tmp_path):
  run = (f'--workdir={tmp_path / "run"}', '--config.mesh.tensor=3')
  result = command('train', '--config=configs/sokoban.py:size=0.5b', *run)
  assert_refused(result, 'tensor=3', 'cannot cut vocab_size, 151936')


@pytest.mark.parametrize('platform', ['tpu', 'cuda'])
def test_missing_jax_platform_is_named(platform, tmp_path):
  result = command(
    *('evaluate', '--config=configs/quickstart.py'),
    f'--config.warm_start.cache={tmp_path}',
    JAX_PLATFORMS=platform,
    CUDA_VISIBLE_DEVICES='-1',
  )
  assert_refused(
    result, f'JAX_PLATFORMS is {platform!r}, for which jax finds no', '=tpu'
  )


def test_distributed_without_cluster_refused(tmp_path):
  result = train(tmp_path / 'run', '--distributed=on')
  assert_refused(
    result,
    '--distributed=on, but this machine does not belong to a known cluster',
    '=off',
  )


def test_help_config_prints_one_section():
  result = command('train', '--help_config', 'weights')
  assert result.returncode == 0
  assert 'weights.beta' in result.stdout
  assert 'rollout.members' not in result.stdout
  whole = command('train', '--help_config')
  assert 'rollout.members' in whole.stdout
  assert_refused(command('train', '--help_config=wieghts'), 'wieghts')


def test_refusal_as_a_process_of_its_own(tmp_path):
  """The server that the other tests use changes nothing."""
  result = subprocess.run(
    [
      *(sys.executable, '-m', 'actfocus_jax.train', QUICKSTART),
      *(f'--workdir={tmp_path / "run"}', '--config.weights.alpha=1.5'),
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert_refused(result, 'weights.alpha', '1.5', '0 to 1')
  assert not (tmp_path / 'run').exists()
