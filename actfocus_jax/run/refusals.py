"""The two ways in which a command ends with one sentence."""


class Refused(ValueError):
  """Bad input: told in one sentence, with exit code 2, before any work."""


class Halted(RuntimeError):
  """A run that cannot go on: told in one sentence, with exit code 1."""


class Stalled(Halted):
  """A run that has nothing left to learn from; all of it is saved."""
