"""Trajectories as one web page that needs only a browser.

The run writes each episode as a line of `rollouts/step_NNNNNN.jsonl`.
`read_episodes` reads it. `render` packs its tokens into short arrays and puts
all episodes into the page as JSON. The script in the page draws the selected
one.

Model text is always data: in the page it is JSON whose `<` are escaped, and the
script sets it as `textContent`, so no text can become markup.
"""

import html
import json
import math
import pathlib
from typing import Any

from actfocus_jax.report import rows as rows_lib

Episode = dict[str, Any]


def write_page(
  rollouts: pathlib.Path, path: pathlib.Path, *, title: str
) -> int:
  """Write the page; return the number of episodes in it."""
  episodes = read_episodes(rollouts)
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(render(episodes, title=title), encoding='utf-8')
  return len(episodes)


def read_episodes(rollouts: pathlib.Path) -> list[Episode]:
  """Read every episode of a run, sorted by step, group and member.

  An episode is {step, game, group, member, success, return, failure, turns}. A
  turn is {prompt, response, reward, penalty, answer}; its prompt is the text
  that is new to the model in this turn. A response is a list of tokens {text,
  logprob, action, weight, signal}; weight and signal may be absent.
  """
  files = sorted(rollouts.glob('step_*.jsonl'))
  episodes = [episode for file in files for episode in rows_lib.read(file)]
  return sorted(episodes, key=lambda e: (e['step'], e['group'], e['member']))


def render(episodes: list[Episode], *, title: str) -> str:
  """Return the page: markup, style, data and script in one string."""
  # ASCII, so that a lone surrogate in a token's text survives as \\udXXX.
  # Without '<' nothing in the data can end the script element.
  data = json.dumps(
    [_pack(episode) for episode in episodes],
    allow_nan=False,
    separators=(',', ':'),
  ).replace('<', '\\u003c')
  return _PAGE.format(
    title=html.escape(title), style=_STYLE, data=data, script=_SCRIPT
  )


def _pack(episode: Episode) -> Episode:
  """Make an episode small: a token becomes a list in a fixed order."""
  turns = [
    turn
    | {name: _number(turn[name]) for name in ('reward', 'penalty')}
    | {'response': [_token(token) for token in turn['response']]}
    for turn in episode['turns']
  ]
  return episode | {'return': _number(episode['return']), 'turns': turns}


def _token(token: dict[str, Any]) -> list[Any]:
  return [
    token['text'],
    int(token['action']),
    _number(token['logprob']),
    _number(token.get('weight')),
    _number(token.get('signal')),
  ]


def _number(value: float | None) -> float | None:
  """Round to four digits, at most nine decimals; None if not finite."""
  if value is None or not math.isfinite(value):
    return None
  return float(f'{round(value, 9):.4g}')  # 0.1 + 0.2 - 0.3 is 0.


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header>
  <h1>{title}</h1>
  <label>evaluation at step <select id="step"></select></label>
  <label>show <select id="filter">
    <option value="all">all</option>
    <option value="solved">solved</option>
    <option value="failed">not solved</option>
  </select></label>
  <label>shade by <select id="shade">
    <option value="3">weight</option>
    <option value="4">signal (energy)</option>
    <option value="2">log-probability</option>
  </select></label>
  <span class="legend"><b class="action">action token</b>
    <span class="thought">other sampled token</span>
    <span class="forced">prompt, observation</span>
    <span id="scale"></span></span>
</header>
<div class="columns">
  <nav id="episodes" aria-label="episodes"></nav>
  <main id="episode"></main>
</div>
<div id="tip" role="tooltip" hidden></div>
<script type="application/json" id="data">{data}</script>
<script>{script}</script>
</body>
</html>
"""

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --faint: #687182;
  --line: #d9dde3; --page: #fff; --soft: #f4f6f8; --shade: 0, 114, 178;
  --action: #00456b; --good: #00704f; --bad: #b04a00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ee;
  --faint: #98a1af; --line: #353c48; --page: #15181e; --soft: #1e232b;
  --shade: 86, 180, 233; --action: #bfe3fa; --good: #4fd1a5;
  --bad: #ff9d5c; } }
* { box-sizing: border-box; }
body { margin: 0; color: var(--ink); background: var(--page);
  font: 15px/1.5 system-ui, sans-serif; }
header { position: sticky; top: 0; z-index: 1; padding: 10px 20px;
  display: flex; flex-wrap: wrap; gap: 6px 20px; align-items: baseline;
  background: var(--page); border-bottom: 1px solid var(--line); }
h1 { font-size: 17px; margin: 0; }
select, button { font: inherit; color: inherit; background: var(--soft);
  border: 1px solid var(--line); border-radius: 5px; padding: 2px 7px; }
.legend { color: var(--faint); font-size: 13px; }
.legend > * { margin-right: 12px; }
.columns { display: flex; align-items: flex-start; }
nav { flex: 0 0 190px; padding: 14px 8px 14px 20px; display: flex;
  flex-direction: column; gap: 4px; position: sticky; top: 50px;
  max-height: calc(100vh - 50px); overflow: auto; }
nav button { text-align: left; cursor: pointer; }
nav button[aria-current=true] { border-color: rgb(var(--shade));
  box-shadow: inset 3px 0 rgb(var(--shade)); }
.solved { color: var(--good); } .failed { color: var(--bad); }
main { flex: 1; min-width: 0; max-width: 900px; padding: 14px 20px 60px; }
section { border: 1px solid var(--line); border-radius: 7px;
  margin: 0 0 14px; overflow: hidden; }
h2 { font-size: 14px; margin: 0; padding: 6px 12px; background: var(--soft);
  display: flex; flex-wrap: wrap; gap: 2px 16px; }
h2 span { font-weight: normal; color: var(--faint); }
pre { margin: 0; padding: 10px 12px; white-space: pre-wrap;
  overflow-wrap: anywhere; font: 13.5px/1.65 ui-monospace, monospace; }
pre.forced { border-bottom: 1px dashed var(--line); }
.thought { color: var(--faint); } .action { color: var(--action);
  font-weight: 700; border-bottom: 2px solid rgb(var(--shade)); }
pre span { border-radius: 2px; }
pre span:hover { outline: 1.5px solid rgb(var(--shade)); }
.newline::before { content: '\\21b5'; opacity: .5; }
#tip { position: fixed; z-index: 2; pointer-events: none; padding: 6px 10px;
  background: var(--ink); color: var(--page); border-radius: 5px;
  font: 12.5px/1.5 ui-monospace, monospace; white-space: pre; }
@media (max-width: 640px) { .columns { display: block; }
  nav { flex-direction: row; position: static; overflow-x: auto;
    padding: 8px 20px; } nav button { white-space: nowrap; } }
"""

_SCRIPT = r"""
'use strict';
const episodes = JSON.parse(document.getElementById('data').textContent);
const at = (id) => document.getElementById(id);
const make = (tag, parent, text = '', className = '') => {
  const element = document.createElement(tag);
  element.textContent = text;
  element.className = className;
  parent.append(element);
  return element;
};
const [LOGPROB, WEIGHT, SIGNAL] = [2, 3, 4];
const show = (x) => (x === null ? '-' : String(x));
let shown = [];
let current = 0;

function tokensOf(episode) {
  return episode.turns.flatMap((turn) => turn.response);
}

function range(episode, field) {
  const values = tokensOf(episode).map((t) => t[field])
    .filter((x) => x !== null);
  // A loop, since spreading many thousand arguments overflows the stack.
  return values.reduce(([low, high], x) => [Math.min(low, x),
    Math.max(high, x)], [Infinity, -Infinity]);
}

function describe(token) {
  const p = token[LOGPROB] === null ? '-' :
    (100 * Math.exp(token[LOGPROB])).toPrecision(3) + ' %';
  return [JSON.stringify(token[0]),
    'log-prob ' + show(token[LOGPROB]) + '  (' + p + ')',
    'signal   ' + show(token[SIGNAL]),
    'weight   ' + show(token[WEIGHT])].join('\n');
}

function drawToken(token, parent, field, [low, high]) {
  const span = make('span', parent, token[0],
    token[1] ? 'action' : 'thought');
  if (token[0].startsWith('\n')) span.classList.add('newline');
  if (token[field] !== null && high > low) {
    let share = (token[field] - low) / (high - low);
    // A surprising token is the one to see, and it has a low log-prob.
    if (field === LOGPROB) share = 1 - share;
    span.style.background = `rgba(var(--shade), ${0.04 + 0.4 * share})`;
  }
  span.tip = describe(token);
}

function drawTurn(turn, number, parent, field, scale) {
  const box = make('section', parent);
  const head = make('h2', box, 'Turn ' + (number + 1));
  make('span', head, turn.answer && turn.answer.length ?
    'answer ' + turn.answer.join(', ') : 'no valid answer');
  make('span', head, 'reward ' + show(turn.reward));
  if (turn.penalty) make('span', head, 'penalty ' + turn.penalty);
  make('span', head, turn.response.length + ' tokens');
  make('pre', box, turn.prompt, 'forced');
  const response = make('pre', box);
  for (const token of turn.response) drawToken(token, response, field, scale);
}

function drawEpisode() {
  const main = at('episode');
  main.replaceChildren();
  at('scale').textContent = '';
  const episode = shown[current];
  if (!episode) {
    make('p', main, 'No such episode here.');
    return;
  }
  const field = Number(at('shade').value);
  const scale = range(episode, field);
  if (scale[0] <= scale[1]) {
    at('scale').textContent = 'shade: ' + (field === LOGPROB ?
      scale[1] + ' to ' + scale[0] : scale[0] + ' to ' + scale[1]);
  } else {
    at('scale').textContent = 'shade: not recorded in this episode';
  }
  const head = make('p', main);
  make('b', head, episode.success ? 'solved' : 'not solved',
    episode.success ? 'solved' : 'failed');
  make('span', head, (episode.game ? ` · ${episode.game}` : '') +
    (episode.failure ? ` · the environment failed: ${episode.failure}` : '') +
    ` · group ${episode.group}, member ${episode.member}` +
    ` · return ${show(episode.return)} · ${episode.turns.length} turns` +
    ` · ${tokensOf(episode).length} sampled tokens`);
  episode.turns.forEach((turn, k) => drawTurn(turn, k, main, field, scale));
}

function choose(index) {
  current = Math.max(0, Math.min(index, shown.length - 1));
  [...at('episodes').children].forEach((button, k) =>
    button.setAttribute('aria-current', k === current));
  const button = at('episodes').children[current];
  if (button) button.scrollIntoView({block: 'nearest'});
  drawEpisode();
}

function list() {
  const step = Number(at('step').value);
  const filter = at('filter').value;
  shown = episodes.filter((e) => e.step === step &&
    (filter === 'all' || e.success === (filter === 'solved')));
  at('episodes').replaceChildren();
  shown.forEach((episode, k) => {
    const button = make('button', at('episodes'));
    make('b', button, episode.success ? '✓ ' : '✗ ',
      episode.success ? 'solved' : 'failed');
    make('span', button, `${episode.group}.${episode.member}` +
      `  return ${show(episode.return)}`);
    button.onclick = () => choose(k);
  });
  choose(0);
}

for (const step of new Set(episodes.map((e) => e.step)))
  make('option', at('step'), step).value = step;
at('step').selectedIndex = at('step').options.length - 1;
at('step').onchange = at('filter').onchange = list;
at('shade').onchange = drawEpisode;
document.onkeydown = (event) => {
  if (event.target.tagName === 'SELECT') return;
  if (event.key === 'j') choose(current + 1);
  if (event.key === 'k') choose(current - 1);
};
document.onmousemove = (event) => {
  const tip = at('tip');
  tip.hidden = !event.target.tip;
  if (tip.hidden) return;
  tip.textContent = event.target.tip;
  tip.style.left = Math.min(event.clientX + 14,
    innerWidth - tip.offsetWidth - 8) + 'px';
  tip.style.top = Math.min(event.clientY + 18,
    innerHeight - tip.offsetHeight - 8) + 'px';
};
list();
"""
