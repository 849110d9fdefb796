"""Export: what was trained comes out as a model directory like any other."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import small_run
import transformers
from flax import nnx

from actfocus_jax import build, loop
from actfocus_jax.cli import paths
from actfocus_jax.model import architecture, files, hf, transformer
from actfocus_jax.parallel import mesh as mesh_lib
from actfocus_jax.run import checkpoint

ROOT = pathlib.Path(__file__).resolve().parent.parent
TOKENS = 64


def config(cache: pathlib.Path, **model):
  """Three steps at a rate that moves what is generated."""
  smaller = dict(episodes=32, steps=30, hidden_size=32, intermediate_size=64)
  return small_run.config(
    cache,
    num_steps=3,
    optimizer__learning_rate=3e-3,
    **{f'warm_start__{name}': value for name, value in smaller.items()},
    **{f'model__{name}': value for name, value in model.items()},
  )


def export(*arguments: str, **environment) -> subprocess.CompletedProcess:
  return subprocess.run(
    [sys.executable, '-m', 'actfocus_jax.export', *arguments],
    cwd=ROOT,
    env={**os.environ, **environment},
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """A run of three steps, and its cache of warm starts."""
  cache = tmp_path_factory.mktemp('cache')
  workdir = tmp_path_factory.mktemp('run')
  small_run.make_warm_start(config(cache))
  with jax.numpy_dtype_promotion('standard'):
    loop.train(config(cache), workdir)
  return workdir, cache


@pytest.fixture(scope='module')
def exported(run, tmp_path_factory):
  out = tmp_path_factory.mktemp('models') / 'mine'
  done = export(f'--workdir={run[0]}', f'--out={out}')
  assert done.returncode == 0, done.stderr
  assert str(out) in done.stdout and 'step 3' in done.stdout
  return out


def _base(run) -> pathlib.Path:
  return pathlib.Path(json.loads((run[0] / 'model.json').read_text())['path'])


def _load(directory):
  mesh = mesh_lib.make_mesh(devices=jax.devices()[:1])
  return hf.load(directory, mesh, dtype=jnp.float32)


def _greedy(directory, ids):
  """64 more ids, each the likeliest after a full forward pass."""
  _, graphdef, params = _load(directory)

  @jax.jit
  def likeliest(params, tokens_BT):
    model = nnx.merge(graphdef, params)
    return model.unembed(model.hidden(tokens_BT)).argmax(-1)

  tokens_BT = np.zeros((1, len(ids) + TOKENS), np.int32)
  tokens_BT[0, : len(ids)] = ids
  for t in range(len(ids), tokens_BT.shape[1]):
    tokens_BT[0, t] = likeliest(params, tokens_BT)[0, t - 1]
  return tokens_BT[0, len(ids) :].tolist()


def _prompt(directory):
  chat = build.chat(config(''), directory)
  return chat.opening('You play.', 'Turn 1:\nState:\nP_G')[0]


def test_exported_weights_equal_checkpoint(run, exported):
  manager = checkpoint.Checkpoints(run[0] / 'checkpoints', read_only=True)
  saved = manager._open().restore(3)['state']
  manager.close()
  _, _, params = _load(exported)
  leaves = jax.tree_util.tree_leaves_with_path(params)
  assert (
    len(leaves) == sum(name.startswith('actor.params.') for name in saved) > 10
  )
  for path, leaf in leaves:
    name = jax.tree_util.keystr(path, simple=True, separator='.')
    np.testing.assert_array_equal(leaf, saved[f'actor.params.{name}'])
  before = _load(_base(run))[2]['embedding'][...]
  assert (before != params['embedding'][...]).any()


def test_exported_companions_equal_base_model(run, exported):
  base = _base(run)
  assert {p.name for p in exported.iterdir()} == {
    p.name for p in base.iterdir()
  }
  for file in base.iterdir():
    if file.suffix != '.safetensors':
      assert (exported / file.name).read_bytes() == file.read_bytes()


def test_exported_model_evaluates_like_checkpoint(run, exported):
  """It is evaluated as the run evaluated it; it talks otherwise than before."""
  c = config(run[1], path=str(exported))
  with jax.numpy_dtype_promotion('standard'):
    _, mine = loop.evaluate(config(run[1]), run[0], 3)
    step, row = loop.evaluate(c, None, None)
  assert step == 0
  for key in ('success', 'tokens', 'actions'):
    assert row[key] == mine[key]
  base, prompt = _base(run), _prompt(exported)
  assert _greedy(exported, prompt) != _greedy(base, prompt)


def test_export_in_bfloat16_rounds_weights(run, exported, tmp_path):
  """Also where the accelerator that jax is told to use is not free."""
  out = tmp_path / 'half'
  done = export(
    f'--workdir={run[0]}',
    f'--out={out}',
    '--dtype=bfloat16',
    JAX_PLATFORMS='cuda',
  )
  assert done.returncode == 0, done.stderr
  whole = safetensors.numpy.load_file(exported / 'model.safetensors')
  half = safetensors.numpy.load_file(out / 'model.safetensors')
  assert whole.keys() == half.keys()
  for name, tensor in whole.items():
    np.testing.assert_array_equal(half[name], tensor.astype(jnp.bfloat16))


def test_bad_export_flags_refused(run, exported, tmp_path):
  new = f'--out={tmp_path / "new"}'
  cases = {
    ('--workdir is missing',): [new],
    ('--out is missing',): [f'--workdir={run[0]}'],
    ('--workdir is', 'does not hold a run'): [f'--workdir={tmp_path}', new],
    ('--out is', 'exists already'): [
      f'--workdir={run[0]}',
      f'--out={exported}',
    ],
    ('--step is 2', 'are: 3'): [f'--workdir={run[0]}', new, '--step=2'],
    ('--config', 'no meaning'): [
      *(f'--workdir={run[0]}', new, '--config=configs/quickstart.py'),
    ],
    ('dtype', 'int8', 'bfloat16'): [f'--workdir={run[0]}', new, '--dtype=int8'],
  }
  for words, arguments in cases.items():
    done = export(*arguments)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith('error: ')
    for word in words:
      assert word in line
  assert not (tmp_path / 'new').exists()


def test_export_of_moved_model_needs_model_path(run, tmp_path):
  workdir = tmp_path / 'run'
  shutil.copytree(run[0], workdir)
  noted = json.loads((workdir / 'model.json').read_text())
  moved = tmp_path / 'moved'
  shutil.copytree(noted['path'], moved)
  noted['path'] = str(tmp_path / 'gone')
  (workdir / 'model.json').write_text(json.dumps(noted))
  out = f'--out={tmp_path / "out"}'
  done = export(f'--workdir={workdir}', out)
  assert done.returncode == 2
  for word in ('--workdir is', str(tmp_path / 'gone'), '--model_path'):
    assert word in done.stderr
  done = export(f'--workdir={workdir}', out, f'--model_path={moved}')
  assert done.returncode == 0, done.stderr
  template = moved / 'chat_template.jinja'
  template.write_text(template.read_text() + ' ')
  done = export(f'--workdir={workdir}', f'{out}2', f'--model_path={moved}')
  assert done.returncode == 2 and 'frozen reference' in done.stderr


def test_export_makes_no_warm_start(run, tmp_path):
  """From another folder the cache of warm starts would be another one."""
  workdir, elsewhere = tmp_path / 'run', tmp_path / 'elsewhere'
  shutil.copytree(run[0], workdir)
  snapshot = json.loads((workdir / 'config.json').read_text())
  snapshot['warm_start.cache'] = str(elsewhere)
  (workdir / 'config.json').write_text(json.dumps(snapshot))
  done = export(f'--workdir={workdir}', f'--out={tmp_path / "out"}')
  assert done.returncode == 0, done.stderr
  assert (tmp_path / 'out').exists() and not elsewhere.exists()


def test_resume_keeps_hub_commit(run, tmp_path, monkeypatch):
  """`main` of a hub id moves; the run does not."""
  snapshot = tmp_path / 'snapshots' / ('c' * 40)
  shutil.copytree(_base(run), snapshot)
  asked = []

  def download(name, *, revision, **_):
    asked.append(revision)
    return str(snapshot)

  monkeypatch.setattr('huggingface_hub.snapshot_download', download)
  files.locate.cache_clear()
  c = config(run[1], path='some/model')
  with c.unlocked():
    c.num_steps = 1
  workdir = tmp_path / 'run'
  with jax.numpy_dtype_promotion('standard'):
    loop.train(c, workdir)
  assert asked == [None]
  noted = json.loads((workdir / 'model.json').read_text())
  assert noted['commit'] == 'c' * 40
  again = config(run[1], path='some/model')
  paths.pin_model(again.model, workdir)
  assert again.model.revision == 'c' * 40
  own = config(run[1], path='some/model', revision='v2')
  paths.pin_model(own.model, workdir)
  assert own.model.revision == 'v2'
  files.locate.cache_clear()


@pytest.mark.slow
def test_qwen3_round_trip_keeps_weights(run, tmp_path):
  """A Qwen3 of random weights: through the loop, a checkpoint and export.

  It earns nothing, so its weights come out as they went in.
  """
  base = _base(run)
  _, _, trained = _load(base)
  config_ = architecture.Config(
    trained['embedding'].shape[0], 32, 48, 2, 4, 2, 16, model_type='qwen3'
  )
  mesh = mesh_lib.make_mesh(devices=jax.devices()[:1])
  _, params = transformer.create(
    config_, mesh, jax.random.key(0), dtype=jnp.float32
  )
  tokenizer = transformers.AutoTokenizer.from_pretrained(base)
  hf.save(tmp_path / 'base', config_, params, tokenizer=tokenizer)
  c = config(run[1], path=str(tmp_path / 'base'), rendering='plain')
  with c.unlocked():
    c.num_steps = 1
  with jax.numpy_dtype_promotion('standard'):
    loop.train(c, tmp_path / 'run')
  done = export(f'--workdir={tmp_path / "run"}', f'--out={tmp_path / "out"}')
  assert done.returncode == 0, done.stderr
  found, _, again = _load(tmp_path / 'out')
  assert found == config_
  assert again['layers']['q_norm']['scale'].shape == (2, 16)
  jax.tree.map(np.testing.assert_array_equal, again, params)


def test_transformers_generates_the_same_greedy_text(exported):
  torch = pytest.importorskip('torch')
  model = transformers.AutoModelForCausalLM.from_pretrained(
    exported, dtype=torch.float32
  )
  tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
  ids = _prompt(exported)
  tokens = torch.tensor([ids])
  theirs = model.generate(
    tokens,
    attention_mask=torch.ones_like(tokens),
    do_sample=False,
    min_new_tokens=TOKENS,  # else it stops at the end of the turn
    max_new_tokens=TOKENS,
    eos_token_id=None,
  )[0, len(ids) :].tolist()
  ours = _greedy(exported, ids)
  assert tokenizer.decode(theirs) == tokenizer.decode(ours)
  assert theirs == ours and len(set(ours)) > 3
  assert model.generation_config.eos_token_id == tokenizer.eos_token_id
