"""The pages of the project: what they point to is there."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [
  page
  for folder in ('', 'actfocus_jax/*', 'configs/*', 'launch')
  for page in sorted(ROOT.glob(f'{folder}/README.md'.lstrip('/')))
]


def links(page):
  """Path and heading of each link that stays in the project."""
  found = re.findall(r'\]\(([^)\s]+)\)', page.read_text())
  return [to.partition('#')[::2] for to in found if '://' not in to]


def headings(page):
  """As they are linked to: small letters, hyphens for blanks."""
  found = re.findall(r'^#+ (.*)$', page.read_text(), re.M)
  return {re.sub(r'[^\w -]', '', x).lower().replace(' ', '-') for x in found}


def test_every_room_with_a_page_is_reached_from_the_front_page():
  reached = {(ROOT / path).resolve() for path, _ in links(PAGES[0])}
  assert PAGES[0] == ROOT / 'README.md'
  assert len(PAGES) > 5
  assert set(PAGES[1:]) <= reached


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.parent.name)
def test_links_lead_somewhere(page):
  assert links(page)
  for path, heading in links(page):
    to = page.parent / path if path else page
    assert to.exists(), f'{path} of {page}'
    if heading:
      assert heading in headings(to.resolve()), f'#{heading} of {page}'


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.parent.name)
def test_files_that_are_named_exist(page):
  """`tests/x.py`, `launch/x.sh`, `configs/x.py`, `actfocus_jax/x.py`."""
  named = re.findall(
    r'\b((?:tests|launch|configs|actfocus_jax)/[\w/]+\.(?:py|sh|png))',
    page.read_text(),
  )
  # Names that stand for any config.
  missing = {x for x in named if not (ROOT / x).exists()}
  assert missing <= {'configs/NAME.py'}
