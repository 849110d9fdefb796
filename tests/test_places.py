"""Where a command may run and write: addresses, platforms, clusters, meshes."""

import pytest
from test_commands import ROOT, assert_refused, command, train

QUICKSTART = '--config=configs/quickstart.py'


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
def test_a_workdir_of_another_scheme_is_quoted_as_typed(module, arguments):
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
def test_what_is_only_on_a_disk_is_no_address(module, flag, arguments):
  result = command(module, *arguments, f'{flag}=gs://b/x')
  assert_refused(
    result,
    f'{flag.removeprefix("--config.")} is gs://b/x; allowed: a directory on '
    'this machine.',
  )
  assert not (ROOT / 'gs:').exists()


def test_a_mesh_is_refused_before_a_model_is_fetched(tmp_path):
  run = (f'--workdir={tmp_path / "run"}', '--config.mesh.tensor=3')
  result = command('train', '--config=configs/sokoban.py:size=0.5b', *run)
  assert_refused(result, 'tensor=3', 'cannot cut vocab_size, 151936')


@pytest.mark.parametrize('platform', ['tpu', 'cuda'])
def test_a_platform_that_jax_does_not_have_is_named(platform, tmp_path):
  result = command(
    *('evaluate', '--config=configs/quickstart.py'),
    f'--config.warm_start.cache={tmp_path}',
    JAX_PLATFORMS=platform,
    CUDA_VISIBLE_DEVICES='-1',
  )
  assert_refused(
    result, f'JAX_PLATFORMS is {platform!r}, for which jax finds no', '=tpu'
  )


def test_a_cluster_that_is_none_is_named(tmp_path):
  result = train(tmp_path / 'run', '--distributed=on')
  assert_refused(
    result, '--distributed=on, but this machine tells of no cluster', '=off'
  )
