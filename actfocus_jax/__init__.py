"""ActFocus: reinforcement learning of multi-turn language-model agents."""

__version__ = '0.1.0'
