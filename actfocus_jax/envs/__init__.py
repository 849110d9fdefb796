"""Environments: pure reset and step on frozen states, text in and text out.

To add a built-in environment: its class in ENVS here; rows of its options,
player and limits in config/fields.py (_OPTIONS, _PLAYERS, _LIMITS); a scripted
player in warmstart/players; lengths in config/presets.py (_TINY_LENGTHS); a
config in configs/.
"""

from actfocus_jax.envs.frozen_lake import FrozenLake
from actfocus_jax.envs.sokoban import Sokoban
from actfocus_jax.envs.sudoku import Sudoku
from actfocus_jax.envs.webshop import WebShop

ENVS = {
  'frozen_lake': FrozenLake,
  'sokoban': Sokoban,
  'sudoku': Sudoku,
  'webshop': WebShop,
}
