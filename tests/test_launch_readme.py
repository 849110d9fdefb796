"""The launch lines of the pages: each fits the machine that it names."""

import re
import shlex

import launch_stubs
import pytest

from actfocus_jax import sizes
from actfocus_jax.aot import chips
from actfocus_jax.cli import dry_run
from actfocus_jax.cli import flags as flags_lib
from actfocus_jax.parallel import mesh_shapes

FRONT = (launch_stubs.ROOT / 'README.md').read_text()
LAUNCH = (launch_stubs.ROOT / 'launch/README.md').read_text()
KINDS = {'v5litepod': 'v5e', 'v6e': 'v6e'}
FREE = 0.1  # Of the memory, as the front page says.
NUMBERS = {'one': 1, 'four': 4, 'eight': 8}
GPUS = re.compile(r'(\w+)(?: GPUs| device)? of (\d+)(?: GB)?\b')


def launch_lines():
  """Section, the line and the TPU type that its block has made, if any."""
  for section in re.split(r'^#+ ', FRONT + LAUNCH, flags=re.M):
    text = section.replace('\\\n', ' ')
    made = ''
    for line in re.findall(r'^ {4}(.*)$', text, re.M):
      slices = re.search(r' --(?:tpu-)?type=(\S+)', line)
      made = slices.group(1) if slices else made
      machine = made or GPUS.search(line.partition('#')[2])
      if '--config=configs/' in line and '--workdir=' in line and machine:
        yield section.splitlines()[0], line, made


LINES = list(launch_lines())


def machine(line, made):
  """Devices of a slice, slices, and the bytes of a device."""
  if made:
    kind, _, count = made.partition('-')
    slices = re.search(r'--num-slices=(\d+)', line)
    hbm = chips.CHIPS[KINDS[kind]].hbm
    return int(count), int(slices.group(1)) if slices else 1, hbm
  count, size = GPUS.search(line.partition('#')[2]).groups()
  return NUMBERS.get(count) or int(count), 1, int(size) * 1e9


def config(line):
  words = shlex.split(line, comments=True)
  (named,) = [w for w in words if w.startswith('--config=')]
  c = flags_lib.read_config(named.partition('=')[2])
  for word in words:
    field = re.fullmatch(r'--config\.(\w+)\.(\w+)=(\d+)', word)
    if field:
      c[field[1]][field[2]] = int(field[3])
  return c


def test_every_launcher_is_read():
  sections = [section for section, _, _ in LINES]
  assert sections == [
    *['Real models, in and out'] * 3,
    *('TPU pod', 'GKE through xpk', 'Slurm on GPUs', 'One GPU box'),
  ]


@pytest.mark.parametrize(
  ('line', 'made'),
  [(line, made) for _, line, made in LINES],
  ids=[section for section, _, _ in LINES],
)
def test_a_launch_line_fits_its_machine(line, made):
  each, slices, memory = machine(line, made)
  c = config(line)
  shape = mesh_shapes.choose(c.mesh, each, slices, sizes.splits(c))
  for axis in (*mesh_shapes.AXES, *mesh_shapes.DCN):
    c.mesh[axis] = getattr(shape, axis)
  needed = dry_run.needs(c, sizes.shape(c, None))['total']
  assert needed <= (1 - FREE) * memory


def test_the_first_section_says_how_to_install_for_each_accelerator():
  first = FRONT.partition('## Two commands')[2].partition('##')[0]
  said = re.findall(r'ACCELERATOR=(\w+) bash launch/environment.sh', first)
  assert said == ['cuda12', 'tpu']
  text = (launch_stubs.ROOT / 'launch/environment.sh').read_text()
  (allowed,) = re.findall(r"^check ACCELERATOR \S+ '(\S+)'", text, re.M)
  assert {*said, 'cuda13'} < set(allowed.split('|'))


def test_two_slices_of_the_pod_need_what_its_comment_says():
  (line,) = [line for section, line, _ in LINES if section == 'TPU pod']
  (said,) = re.findall(r'joins two slices; they need (\S+),', LAUNCH)
  with pytest.raises(ValueError, match=r'cannot cut learner\.microbatch'):
    c = config(line)
    mesh_shapes.choose(c.mesh, 16, 2, sizes.splits(c))
  c = config(f'{line} {said}')
  mesh_shapes.choose(c.mesh, 16, 2, sizes.splits(c))
