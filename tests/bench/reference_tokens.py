"""Scoring some tokens against scoring all of them, side by side.

JAX_PLATFORMS=cpu python tests/bench/reference_tokens.py [--repeats=7] \
  [--rows=8] [--length=512] [--vocab=50000] [--width=256] [--layers=4] \
  [--chunk=512] [--percent=4,10,16,100]

One process, one random model, one batch of full rows. `scoring.score_tokens`
gives every token its scores; `scoring.score_some` only the marked ones, drawn
anew for each repeat. After a first round that compiles, every repeat times all
of them and the layers alone, each in another order, and divides by the full
scoring of the same repeat. Printed is the median over the repeats, and the
least and the greatest. Ratios below 1 are time saved; the layers alone are the
least that any number of marks can cost.
"""

import argparse
import functools
import pathlib
import statistics
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from flax import nnx  # noqa: E402

from actfocus_jax.model import architecture, scoring, transformer  # noqa: E402
from actfocus_jax.parallel import mesh as mesh_lib  # noqa: E402

FULL, LAYERS = 'full', 'layers'


def model_of(args):
  """A random model with heads of 64."""
  heads = args.width // 64
  config = architecture.Config(
    args.vocab, args.width, 4 * args.width, args.layers, heads, heads, 64
  )
  mesh = mesh_lib.make_mesh(devices=jax.devices()[:1])
  key = jax.random.key(0)
  return transformer.create(config, mesh, key, dtype=jnp.float32)


def marks(rng, shape, percent):
  """Exactly so many tokens of those that have a score, drawn at random."""
  rows, length = shape
  scored = rows * (length - 1)
  chosen = np.zeros(scored, bool)
  chosen[: round(scored * percent / 100)] = True
  chosen = rng.permutation(chosen).reshape(rows, length - 1)
  return jnp.asarray(np.pad(chosen, ((0, 0), (1, 0))))


def cases_of(args):
  """Name -> a function of the marks; and the marks of each name."""
  graphdef, params = model_of(args)
  rng, shape = np.random.default_rng(0), (args.rows, args.length)
  tokens = jnp.asarray(rng.integers(0, args.vocab, shape, np.int32))
  batch = (tokens, jnp.ones(shape, bool))
  score = functools.partial(scoring.score_tokens, graphdef, chunk=args.chunk)
  some = functools.partial(scoring.score_some, graphdef, chunk=args.chunk)
  score, some = jax.jit(score), jax.jit(some)
  layers = jax.jit(lambda p, t: nnx.merge(graphdef, p).hidden(t))
  cases = {
    FULL: lambda at: score(params, *batch),
    LAYERS: lambda at: layers(params, tokens),
  }
  for percent in args.percent:
    cases[f'{percent:g} %'] = lambda at: some(params, *batch, at)
  percents = dict(zip(cases, [0, 0, *args.percent], strict=True))
  return cases, lambda name: marks(rng, shape, percents[name])


def check(cases, draw):
  """Runs every case once; what is marked must have the scores of the full."""
  every = cases[FULL](draw(FULL))
  jax.block_until_ready(cases[LAYERS](None))
  for name in cases.keys() - {FULL, LAYERS}:
    mask_BT = draw(name)
    for ours, theirs in zip(
      jax.tree.leaves(cases[name](mask_BT)), jax.tree.leaves(every), strict=True
    ):
      expected = np.where(mask_BT, theirs, 0.0)
      np.testing.assert_allclose(ours, expected, atol=1e-3, err_msg=name)


def measure(cases, draw, repeats):
  """Name -> seconds of each repeat."""
  seconds, rng = {name: [] for name in cases}, np.random.default_rng(1)
  for _ in range(repeats):
    for name in rng.permutation(list(cases)):
      mask_BT = jax.block_until_ready(draw(name))
      begin = time.perf_counter()
      jax.block_until_ready(cases[name](mask_BT))
      seconds[name].append(time.perf_counter() - begin)
  return seconds


def show(seconds):
  """One line a case: median seconds; ratio to the full: median, range."""
  print(f'{"case":>8} {"seconds":>9} {"ratio":>7} {"least":>7} {"most":>7}')
  for name, times in seconds.items():
    pairs = zip(times, seconds[FULL], strict=True)
    ratios = [one / full for one, full in pairs]
    middle, ratio = statistics.median(times), statistics.median(ratios)
    spread = f'{min(ratios):7.3f} {max(ratios):7.3f}'
    print(f'{name:>8} {middle:9.3f} {ratio:7.3f} {spread}')


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--repeats', type=int, default=7)
  parser.add_argument('--rows', type=int, default=8)
  parser.add_argument('--length', type=int, default=512)
  parser.add_argument('--vocab', type=int, default=50_000)
  parser.add_argument('--width', type=int, default=256)
  parser.add_argument('--layers', type=int, default=4)
  parser.add_argument('--chunk', type=int, default=512)
  parser.add_argument(
    '--percent',
    type=lambda text: [float(x) for x in text.split(',')],
    default=[4.0, 10.0, 16.0, 100.0],
  )
  args = parser.parse_args()
  cases, draw = cases_of(args)
  check(cases, draw)
  print(
    f'{args.rows} x {args.length} tokens, vocabulary {args.vocab}, width'
    f' {args.width}, {args.layers} layers, chunk {args.chunk},'
    f' {args.repeats} repeats on {jax.devices()[0].device_kind}'
  )
  show(measure(cases, draw, args.repeats))


if __name__ == '__main__':
  main()
