"""Environments: pure reset and step on frozen states, text in and text out."""

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
