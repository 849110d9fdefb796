"""Seconds that one of two processes survives after the other is killed.

Two processes of one CPU device each, over loopback and with the real timeouts,
train steps that take no time. Each repetition kills process 0 in one run and
process 1 in another, and measures the seconds until the other one has ended.

  PYTHONPATH=.:tests python tests/bench/lost_process.py --repeats=3
"""

import argparse
import json
import pathlib
import signal
import statistics
import tempfile
import time

import processes
import test_several_processes as several


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--repeats', type=int, default=3)
  repeats = parser.parse_args().repeats
  lost: dict[int, list[float]] = {0: [], 1: []}
  with tempfile.TemporaryDirectory() as folder:
    for i in range(repeats):
      for victim, seconds in lost.items():
        seconds.append(lose(pathlib.Path(folder), f'{i}-{victim}', victim))
        print(f'process {victim} killed: {seconds[-1]:.1f} s', flush=True)
  print(json.dumps({victim: summary(x) for victim, x in lost.items()}))


def lose(place: pathlib.Path, name: str, victim: int) -> float:
  """Return the seconds from the kill to the end of the other process."""
  started = several.start_small(place, name, before='')
  processes.wait_for(lambda: len(several.rows(place / name)) > 1, started)
  started[victim].send_signal(signal.SIGKILL)
  begin = time.monotonic()
  other = started[1 - victim]
  other.communicate(timeout=processes.TIMEOUT)
  if other.returncode == 0:
    raise RuntimeError('the other process ended with exit code 0')
  return time.monotonic() - begin


def summary(seconds: list[float]) -> dict[str, float]:
  """Median and range."""
  return {
    'median': round(statistics.median(seconds), 1),
    'least': round(min(seconds), 1),
    'most': round(max(seconds), 1),
  }


if __name__ == '__main__':
  main()
