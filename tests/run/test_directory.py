"""A run directory whose first start was killed."""

import pytest

from actfocus_jax import errors
from actfocus_jax.cli import paths
from actfocus_jax.config import schema
from actfocus_jax.run import directory, storage


def opened(workdir, c, **model):
  return directory.RunDirectory(workdir, c, model)


def test_a_kill_before_the_config_is_written_leaves_no_run(
  tmp_path, monkeypatch
):
  c, write = schema.defaults(), storage.write

  def killed(path, content):
    if path.name == 'config.json':
      raise KeyboardInterrupt
    write(path, content)

  first = opened(tmp_path, c, sha256='a', commit='a1b2')
  with monkeypatch.context() as patch:
    patch.setattr(storage, 'write', killed)
    with pytest.raises(KeyboardInterrupt):
      first.__enter__()
  assert {p.name for p in tmp_path.iterdir()} == {'.lock', 'model.json'}
  # Another config and another model may begin there, as in an empty directory.
  c.seed, c.model.path = 1, 'qwen/qwen'
  paths.check_workdir(tmp_path, c)
  paths.pin_model(c, tmp_path)
  assert c.model.revision == ''
  with opened(tmp_path, c, sha256='b'):
    pass
  with pytest.raises(errors.UsageError, match='are not those that the run'):
    opened(tmp_path, c, sha256='a', path='x')
