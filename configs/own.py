"""An environment of your own, or a mixture of several.

python -m actfocus_jax.train --config=configs/own.py:env=package.module:Class \
  --workdir=runs/own
python -m actfocus_jax.train --config=configs/own.py:env=frozen_lake+sokoban \
  --config.mixture.sokoban.share=3 --workdir=runs/mixture

Options of the environment are --config.env.options.NAME; those of a mixture are
--config.mixture.LABEL.options.NAME. LABEL is the name of the environment or, in
lower case, of the class. Settings of the other configs, such as
selection.ratio, are not included.

Hardware and time: two CPU cores and minutes with size=tiny; it depends on the
environment.
Expected: not measured.
"""

from actfocus_jax import errors
from actfocus_jax.config import presets, schema


def get_config(arg=None):
  """Arguments: env=NAME[+NAME...], size, algo, weights and estimator."""
  choice = presets.arguments(arg, env='frozen_lake')
  names = choice['env'].split('+')
  if len(set(names)) < len(names):
    raise errors.UsageError(
      f'env is {choice["env"]!r}; allowed: each environment once.'
    )
  shares = dict.fromkeys(names, 1.0)
  c = schema.defaults(shares if len(names) > 1 else names[0])
  presets.apply(c, choice)
  c.lock()
  return c
