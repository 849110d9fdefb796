"""The page holds every episode as data; no text can become markup."""

import html.parser
import json

import pytest

from actfocus_jax.report import viewer

TOKENS = [
  {'text': '<think>', 'logprob': -0.123456, 'action': False, 'weight': 0.1},
  {'text': 'Up', 'logprob': float('-inf'), 'action': True, 'signal': -5.25},
]


def episode(step=10, group=0, member=0, response=TOKENS, prompt='board'):
  turn = {
    'prompt': prompt,
    'response': response,
    'reward': 1.0,
    'penalty': -0.1,
    'answer': ['Up'],
  }
  return {
    'step': step,
    'group': group,
    'member': member,
    'success': True,
    'return': 0.9,
    'turns': [turn],
  }


class Page(html.parser.HTMLParser):
  """Page as a browser reads it: script contents end at `</script`."""

  def __init__(self, page):
    super().__init__()
    self.tags, self.text, self._open = [], {}, None
    self.links = []
    self.feed(page)

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    attrs = dict(attrs)
    self._open = attrs.get('id', tag)
    self.links += [attrs[key] for key in ('src', 'href') if key in attrs]

  def handle_data(self, data):
    self.text.setdefault(self._open, '')
    self.text[self._open] += data


def data_of(page):
  return json.loads(Page(page).text['data'])


def test_render_packs_tokens_in_the_order_of_the_script():
  (packed,) = data_of(viewer.render([episode()], title='run'))
  assert packed['turns'][0]['response'] == [
    ['<think>', 0, -0.1235, 0.1, None],
    ['Up', 1, None, None, -5.25],
  ]
  assert packed['return'] == 0.9
  assert packed['turns'][0]['penalty'] == -0.1


def test_render_rewards_that_cancel_are_zero():
  cancelled = episode() | {'return': 0.1 + 0.2 - 0.3}
  assert cancelled['return'] != 0
  (packed,) = data_of(viewer.render([cancelled], title='run'))
  assert packed['return'] == 0


@pytest.mark.parametrize(
  'text',
  [
    '</script><script>alert(1)</script>',
    '<!--<script>',
    '<img src=x onerror=alert(1)>',
    '&lt;b&gt; & "quotes" \\u003c',
    '\ufffd\u2028\ud83d',
  ],
)
def test_render_hostile_text_is_unchanged_and_no_markup(text):
  plain = Page(viewer.render([episode()], title='run'))
  token = {'text': text, 'logprob': 0.0, 'action': True}
  hostile = viewer.render(
    [episode(response=[token], prompt=text)], title=text.replace('\ud83d', '')
  )
  hostile.encode('utf-8')
  page = Page(hostile)
  assert page.tags == plain.tags
  (packed,) = data_of(hostile)
  assert packed['turns'][0]['response'][0][0] == text
  assert packed['turns'][0]['prompt'] == text


def test_render_parses_no_text_as_markup_and_loads_nothing():
  page = viewer.render([episode()], title='run')
  for way in ('innerHTML', 'outerHTML', 'insertAdjacentHTML', 'document.write'):
    assert way not in page
  assert Page(page).links == []
  assert 'url(' not in page
  assert 'http' not in page


def test_read_episodes_in_order_without_a_torn_line(tmp_path):
  rollouts = tmp_path / 'rollouts'
  rollouts.mkdir()
  late = [episode(10, 1, 0), episode(10, 0, 1)]
  lines = ''.join(json.dumps(e) + '\n' for e in late)
  (rollouts / 'step_000010.jsonl').write_text(lines + '{"step": 10, "gr')
  line = json.dumps(episode(0, 3, 2)) + '\n'
  (rollouts / 'step_000000.jsonl').write_text(line)
  read = viewer.read_episodes(rollouts)
  order = [(e['step'], e['group'], e['member']) for e in read]
  assert order == [(0, 3, 2), (10, 0, 1), (10, 1, 0)]

  path = tmp_path / 'report' / 'page.html'
  assert viewer.write_page(rollouts, path, title='run <1>') == 3
  page = path.read_text(encoding='utf-8')
  assert [e['step'] for e in data_of(page)] == [0, 10, 10]
  assert '<title>run &lt;1&gt;</title>' in page


def test_write_page_without_rollouts_is_empty(tmp_path):
  path = tmp_path / 'page.html'
  assert viewer.write_page(tmp_path / 'rollouts', path, title='run') == 0
  assert data_of(path.read_text()) == []
