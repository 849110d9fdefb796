"""A tiny policy that can hold a conversation, and what it said.

Random weights almost never write an answer, so the embedding and the head are
set to a table of which token tends to follow which. The layers between stay
random and strong enough that every log-probability depends on all tokens
before it.
"""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import pytest
import tokenizers
from tokenizers import (
  decoders,
  models,
  normalizers,
  pre_tokenizers,
  processors,
  trainers,
)

from actfocus_jax.envs import frozen_lake
from actfocus_jax.model import architecture, transformer
from actfocus_jax.parallel import mesh as mesh_lib
from actfocus_jax.rollout import collector as collector_lib
from actfocus_jax.rollout import episode, games
from actfocus_jax.text import chat as chat_lib
from actfocus_jax.warmstart import demonstrations, players

ROOT = pathlib.Path(__file__).resolve().parents[2]
QWEN = ROOT.parent / 'shared' / 'data' / 'qwen2.5-tokenizer'

LIMITS = games.Limits(
  turns=3, max_actions=2, action_budget=5, response_tokens=11, context=236
)
LENGTH = 240
SEEDS = (3, 4, 5)
MEMBERS = 4

_MOVES = dict.fromkeys(('Left', 'Down', 'Right', 'Up'), 8.0)
# Logits of what follows a token, above those of all that is not named.
_FOLLOWS = {
  '<think>': {'</think>': 7.5},
  '</think>': {'<answer>': 10.0},
  '<answer>': _MOVES,
  **dict.fromkeys(_MOVES, {' || ': 9.0, '</answer>': 10.0}),
  ' || ': _MOVES,
  '</answer>': {'<|im_end|>': 10.0},
  None: {'</think>': 6.5, '<|im_end|>': 3.5},
}


@pytest.fixture(scope='package')
def limits():
  """So tight that the context ends some of the episodes."""
  return LIMITS


@pytest.fixture(scope='package')
def lake():
  return frozen_lake.FrozenLake(
    instructions='P walks to G (√), not into O (X).'
  )


@pytest.fixture(scope='package')
def tokenizer(lake):
  return demonstrations.train_tokenizer(
    [
      (
        games.Game('lake', lake, LIMITS),
        players.frozen_lake.FrozenLakeCareless(),
      )
    ],
    range(80),
    vocab_size=560,
  )


@pytest.fixture(scope='package')
def chat(tokenizer):
  return chat_lib.Chat(tokenizer)


@pytest.fixture(scope='package')
def qwen():
  """The real tokenizer, where somebody has put it."""
  if not QWEN.is_dir():
    pytest.skip('no ../shared/data/qwen2.5-tokenizer beside the project')
  return chat_lib.Chat(chat_lib.load_tokenizer(QWEN))


@pytest.fixture(scope='package')
def policy(tokenizer):
  config = architecture.Config(
    vocab_size=len(tokenizer),
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    rope_theta=100.0,
    tie_word_embeddings=False,
  )
  mesh = mesh_lib.make_mesh(devices=jax.devices()[:1])
  graphdef, params = transformer.create(
    config, mesh, jax.random.key(0), dtype=jnp.float32
  )
  params = jax.tree_util.tree_map_with_path(_noisy, params)
  embedding_VD, head_DV = _tables(tokenizer, config)
  params['embedding'][...], params['head'][...] = embedding_VD, head_DV
  return collector_lib.Policy(config, graphdef, params, jnp.float32)


def _noisy(path, leaf):
  name = mesh_lib.path_name(path)
  key = jax.random.fold_in(jax.random.key(7), sum(map(ord, name)))
  return leaf + 0.1 * jax.random.normal(key, leaf.shape, leaf.dtype)


def _tables(tokenizer, config):
  shape = (config.vocab_size, config.hidden_size)
  embedding_VD = 0.3 * jax.random.normal(jax.random.key(1), shape)
  head_DV = 0.05 * jax.random.normal(jax.random.key(2), shape[::-1])
  row_of = {name: row for row, name in enumerate(_FOLLOWS)}
  for index in range(config.vocab_size):
    row = row_of.get(tokenizer.decode([index]), row_of[None])
    embedding_VD = embedding_VD.at[index, row].add(2.0)
  for name, followers in _FOLLOWS.items():
    for follower, logit in followers.items():
      (index,) = tokenizer.encode(follower, add_special_tokens=False)
      # The last norm makes about 4 of the 2.0 above.
      head_DV = head_DV.at[row_of[name], index].add(logit / 3.5)
  return embedding_VD, head_DV


@pytest.fixture(scope='package')
def collect(chat, lake, policy):
  """Plays `MEMBERS` episodes on each of `SEEDS`; keywords change one thing."""

  def run(
    *,
    seeds=SEEDS,
    members=MEMBERS,
    key=0,
    temperature=1.0,
    devices=1,
    limits=LIMITS,
    played=None,
    **shapes,
  ):
    mesh = mesh_lib.make_mesh(devices=jax.devices()[:devices])
    where = mesh_lib.param_shardings(
      mesh, transformer.PARTITION_RULES, policy.params
    )
    placed = dataclasses.replace(
      policy, params=jax.device_put(policy.params, where)
    )
    played = played or (games.Game('lake', lake, limits),)
    collector = collector_lib.Collector(chat, played, mesh, **shapes)
    with jax.set_mesh(mesh):
      return collector.collect(
        placed,
        seeds,
        jax.random.key(key),
        members=members,
        temperature=temperature,
      )

  return run


@pytest.fixture(scope='package')
def pad(chat):
  """Lays the episodes of a rollout side by side."""

  def run(played):
    return episode.to_trajectory(
      played.episodes, played.groups, length=LENGTH, pad=chat.pad_id
    )

  return run


@pytest.fixture(scope='package')
def played(collect):
  """One rollout that most tests look at."""
  return collect()


@pytest.fixture(scope='package')
def batch(played, pad):
  """The same as a padded batch."""
  return pad(played)


# --- Tokenizers like those of known families ---------------------------------

_CORPUS = (
  'You are at (1, 2). State: #_√O player goal Turn Reward Actions left',
  'Up Down Left Right answer think so I go on, é ü 😀 || 10 2026 thought',
) * 4
_LLAMA3_WORDS = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
  r' ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)
_HEADER = "'<|start_header_id|>' + m.role + '<|end_header_id|>\n\n'"
_BY_ROLE = (
  '{{ bos_token }}{% for m in messages %}'
  "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
  "{{ raise_exception('Roles must alternate.') }}{% endif %}"
  "{% if m.role == 'user' %}USER{% else %}OTHER{% endif %}{% endfor %}"
)
_INST = _BY_ROLE.replace('USER', "{{ '[INST] ' + m.content + ' [/INST]' }}")
_WITH_SYSTEM = (
  "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
  '{% set messages = messages[1:] %}{% endif %}'
)
_CHATML = (
  '{% for m in messages %}'
  "{{ '<|im_start|>' + m.role + '\n' + CONTENT + '<|im_end|>\n' }}"
  '{% endfor %}'
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {
  'chatml': _CHATML.replace('CONTENT', 'm.content'),
  # Thoughts stay only behind the last user message.
  'qwen3': _CHATML.replace(
    'CONTENT',
    "(m.content.split('</think>')[-1].lstrip('\n')"
    " if m.role == 'assistant' else m.content)",
  ),
  'llama3': (
    '{{ bos_token }}{% for m in messages %}'
    '{{ ' + _HEADER + " + m.content | trim + '<|eot_id|>' }}{% endfor %}"
    '{% if add_generation_prompt %}'
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
  ),
  'llama2': _WITH_SYSTEM
  + _BY_ROLE.replace(
    'USER',
    "{% set text = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + m.content"
    ' if loop.first and system is defined else m.content %}'
    "{{ '[INST] ' + text.strip() + ' [/INST]' }}",
  ).replace('OTHER', "{{ ' ' + m.content.strip() + ' ' + eos_token }}"),
  'mistral': _INST.replace('OTHER', "{{ ' ' + m.content + eos_token }}"),
  # The system message moves to the last user message.
  'mistral3': _WITH_SYSTEM
  + _BY_ROLE.replace(
    'USER',
    "{{ '[INST]' + (system + '\n\n' if loop.revindex0 < 1 and system is"
    " defined else '') + m.content + '[/INST]' }}",
  ).replace('OTHER', '{{ m.content + eos_token }}'),
  'zephyr': (
    '{% for m in messages %}'
    "{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
  ),
  'gemma': _BY_ROLE.replace(
    'USER',
    "{{ '<start_of_turn>user\n' + m.content | trim + '<end_of_turn>\n' }}",
  ).replace(
    'OTHER',
    "{{ '<start_of_turn>model\n' + m.content | trim + '<end_of_turn>\n' }}",
  )
  + "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
}
# Llama 2's without the space before the token that closes a turn.
TEMPLATES['inst'] = TEMPLATES['llama2'].replace("+ ' ' + eos", '+ eos')
# The names of bos, eos and pad, and more special tokens.
_SPECIAL = {
  'qwen3': (None, '<|im_end|>', '<|endoftext|>', '<|im_start|>'),
  'llama3': (
    *('<|begin_of_text|>', '<|end_of_text|>', None, '<|start_header_id|>'),
    *('<|end_header_id|>', '<|eot_id|>'),
  ),
  'legacy': ('<s>', '</s>', None, '<unk>'),
  'metaspace': ('<s>', '</s>', None, '<unk>'),
  'gemma': (
    *('<bos>', '<eos>', '<pad>', '<unk>'),
    *('<start_of_turn>', '<end_of_turn>'),
  ),
}


def _trained(backend, size, **kwargs):
  """Vocabulary (in the order of ids) and merges, learnt from the corpus."""
  trainer = trainers.BpeTrainer(vocab_size=size, show_progress=False, **kwargs)
  backend.train_from_iterator(_CORPUS, trainer)
  model = json.loads(backend.to_str())['model']
  vocab = sorted(model['vocab'], key=model['vocab'].get)
  return vocab, [tuple(pair) for pair in model['merges']]


def _byte_level(kind):
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  backend = tokenizers.Tokenizer(models.BPE())
  words = pre_tokenizers.Split(tokenizers.Regex(_LLAMA3_WORDS), 'isolated')
  to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  backend.pre_tokenizer = pre_tokenizers.Sequence([words, to_bytes])
  backend.decoder = decoders.ByteLevel()
  _trained(backend, 400, initial_alphabet=alphabet)
  if kind == 'qwen3':
    backend.normalizer = normalizers.NFC()
  return backend


def _byte_fallback(kind):
  """SentencePiece's BPE: a dummy space by normalizer, by words, or none."""
  learner = tokenizers.Tokenizer(models.BPE())
  learner.pre_tokenizer = pre_tokenizers.Metaspace()
  learnt, merges = _trained(learner, 200)
  names = [name for name in _SPECIAL[kind] if name]
  names += [f'<0x{byte:02X}>' for byte in range(256)]
  names += [token for token in learnt if token not in '√😀é']
  merges = [pair for pair in merges if not set('√😀é') & set(''.join(pair))]
  backend = tokenizers.Tokenizer(
    models.BPE(
      vocab={name: index for index, name in enumerate(dict.fromkeys(names))},
      merges=merges,
      unk_token='<unk>',
      fuse_unk=True,
      byte_fallback=True,
    )
  )
  to_marks = normalizers.Replace(' ', '▁')
  steps = [decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse()]
  if kind == 'metaspace':
    backend.pre_tokenizer = pre_tokenizers.Metaspace('▁', 'first', False)
  elif kind == 'legacy':
    first = normalizers.Prepend('▁')
    backend.normalizer = normalizers.Sequence([first, to_marks])
  else:
    backend.normalizer = to_marks
  if kind != 'gemma':
    steps.append(decoders.Strip(' ', 1, 0))
  backend.decoder = decoders.Sequence(steps)
  return backend


def _word_piece(_):
  backend = tokenizers.Tokenizer(models.WordPiece(unk_token='[UNK]'))
  backend.pre_tokenizer = pre_tokenizers.Whitespace()
  backend.decoder = decoders.WordPiece()
  trainer = trainers.WordPieceTrainer(
    vocab_size=200, special_tokens=['[UNK]'], show_progress=False
  )
  backend.train_from_iterator(_CORPUS, trainer)
  return backend


def _unigram(_):
  backend = tokenizers.Tokenizer(models.Unigram())
  backend.pre_tokenizer = pre_tokenizers.Metaspace()
  backend.decoder = decoders.Metaspace()
  trainer = trainers.UnigramTrainer(
    vocab_size=90,
    unk_token='<unk>',
    special_tokens=['<unk>'],
    show_progress=False,
  )
  backend.train_from_iterator(_CORPUS, trainer)
  return backend


_BACKENDS = {
  'qwen3': _byte_level,
  'llama3': _byte_level,
  'legacy': _byte_fallback,
  'metaspace': _byte_fallback,
  'gemma': _byte_fallback,
  'wordpiece': _word_piece,
  'unigram': _unigram,
}


@pytest.fixture(scope='package')
def templates():
  return TEMPLATES


@pytest.fixture(scope='package')
def tokenizer_dir(tmp_path_factory):
  """Writes a tokenizer directory as model repositories hold it.

  `kind` is a key of `_BACKENDS`; `template` the text of a chat template or a
  key of `TEMPLATES`; `edit` changes the JSON of tokenizer.json, and keywords
  are more entries of tokenizer_config.json.
  """

  def make(kind, template='chatml', *, edit=None, **config):
    directory = tmp_path_factory.mktemp(kind)
    backend = _BACKENDS[kind](kind)
    bos, eos, pad, *others = _SPECIAL.get(kind, ('[BOS]', '[EOS]', None))
    special = [name for name in (bos, eos, pad, *others) if name]
    backend.add_special_tokens(
      [
        tokenizers.AddedToken(n, special=True, normalized=False)
        for n in special
      ]
    )
    if kind == 'qwen3':
      thinking = [tokenizers.AddedToken(f'<{s}think>') for s in ('', '/')]
      backend.add_tokens(thinking)
    if bos in ('<|begin_of_text|>', '<s>', '<bos>'):
      pair = (bos, backend.token_to_id(bos))
      backend.post_processor = processors.TemplateProcessing(
        single=f'{bos} $A', special_tokens=[pair]
      )
    described = json.loads(backend.to_str())
    if edit is not None:
      edit(described)
    config = {
      'tokenizer_class': 'PreTrainedTokenizerFast',
      'clean_up_tokenization_spaces': True,
      'chat_template': TEMPLATES.get(template, template),
      **{'bos_token': bos, 'eos_token': eos, 'pad_token': pad},
      **config,
    }
    (directory / 'tokenizer.json').write_text(json.dumps(described))
    (directory / 'tokenizer_config.json').write_text(json.dumps(config))
    return directory

  return make


@pytest.fixture(scope='package')
def make_chat(tokenizer_dir):
  """The bridge of such a directory."""

  def make(kind, template='chatml', *, rendering='template', **changes):
    directory = tokenizer_dir(kind, template, **changes)
    loaded = chat_lib.load_tokenizer(directory)
    return chat_lib.Chat(loaded, rendering=rendering)

  return make
