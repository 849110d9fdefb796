"""Tokenizers and chat templates like those of the model families."""

import json
import pathlib

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
from actfocus_jax.rollout import games
from actfocus_jax.text import chat as chat_lib
from actfocus_jax.warmstart import demonstrations, players

ROOT = pathlib.Path(__file__).resolve().parents[2]
QWEN = ROOT.parent / 'shared' / 'data' / 'qwen2.5-tokenizer'


@pytest.fixture(scope='package')
def tokenizer():
  """The tokenizer of the built-in model."""
  lake = frozen_lake.FrozenLake(
    instructions='P walks to G (√), not into O (X).'
  )
  player = players.frozen_lake.FrozenLakeCareless()
  limits = games.Limits(turns=3, action_budget=5, response_tokens=99)
  cast = [(games.Game('lake', lake, limits), player)]
  return demonstrations.train_tokenizer(cast, range(80), vocab_size=560)


@pytest.fixture(scope='package')
def chat(tokenizer):
  return chat_lib.Chat(tokenizer)


@pytest.fixture(scope='package')
def qwen():
  """The tokenizer of Qwen2.5, if its files are beside the project."""
  if not QWEN.is_dir():
    pytest.skip('no ../shared/data/qwen2.5-tokenizer beside the project')
  return chat_lib.Chat(chat_lib.load_tokenizer(QWEN))


# --- Chat templates ----------------------------------------------------------

_CHATML = (
  '{% for m in messages %}'
  "{{ '<|im_start|>' + m.role + '\n' + CONTENT + '<|im_end|>\n' }}"
  '{% endfor %}'
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_HEADER = "'<|start_header_id|>' + m.role + '<|end_header_id|>\n\n'"
_BY_ROLE = (
  "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
  '{% set messages = messages[1:] %}{% endif %}'
  '{{ bos_token }}{% for m in messages %}'
  "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
  "{{ raise_exception('Roles must alternate.') }}{% endif %}"
  "{% if m.role == 'user' %}USER{% else %}OTHER{% endif %}{% endfor %}"
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
  # A space stands before the token that closes a turn.
  'llama2': _BY_ROLE.replace(
    'USER',
    "{% set text = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + m.content"
    ' if loop.first and system is defined else m.content %}'
    "{{ '[INST] ' + text.strip() + ' [/INST]' }}",
  ).replace('OTHER', "{{ ' ' + m.content.strip() + ' ' + eos_token }}"),
  # The system message moves to the last user message.
  'mistral': _BY_ROLE.replace(
    'USER',
    "{{ '[INST]' + (system + '\n\n' if loop.revindex0 < 1 and system is"
    " defined else '') + m.content + '[/INST]' }}",
  ).replace('OTHER', '{{ m.content + eos_token }}'),
}
# Llama 2's template without that space.
TEMPLATES['inst'] = TEMPLATES['llama2'].replace("+ ' ' + eos", '+ eos')


@pytest.fixture(scope='package')
def templates():
  return TEMPLATES


# --- Tokenizers --------------------------------------------------------------

_CORPUS = (
  'You are at (1, 2). State: #_√O player goal Turn Reward Actions left',
  'Up Down Left Right answer think so I go on, é ü 😀 || 10 2026 thought',
) * 4
_LLAMA3_WORDS = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
  r' ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)
# The names of bos, eos and pad, and more special tokens.
_SPECIAL = {
  'qwen3': (None, '<|im_end|>', '<|endoftext|>', '<|im_start|>'),
  'llama3': (
    *('<|begin_of_text|>', '<|end_of_text|>', None, '<|start_header_id|>'),
    *('<|end_header_id|>', '<|eot_id|>'),
  ),
  'llama2': ('<s>', '</s>', None, '<unk>'),
  'mistral': ('<s>', '</s>', None, '<unk>'),
}


def _train(backend, size, **kwargs):
  """Learns vocabulary (in the order of ids) and merges from the corpus."""
  trainer = trainers.BpeTrainer(vocab_size=size, show_progress=False, **kwargs)
  backend.train_from_iterator(_CORPUS, trainer)
  model = json.loads(backend.to_str())['model']
  vocab = sorted(model['vocab'], key=model['vocab'].get)
  return vocab, [tuple(pair) for pair in model['merges']]


def _byte_level(kind):
  backend = tokenizers.Tokenizer(models.BPE())
  words = pre_tokenizers.Split(tokenizers.Regex(_LLAMA3_WORDS), 'isolated')
  to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  backend.pre_tokenizer = pre_tokenizers.Sequence([words, to_bytes])
  backend.decoder = decoders.ByteLevel()
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  _train(backend, 400, initial_alphabet=alphabet)
  if kind == 'qwen3':
    backend.normalizer = normalizers.NFC()
  return backend


def _byte_fallback(kind):
  """SentencePiece's BPE; the dummy space is put by normalizer or by words."""
  learner = tokenizers.Tokenizer(models.BPE())
  learner.pre_tokenizer = pre_tokenizers.Metaspace()
  learnt, merges = _train(learner, 200)
  names = [name for name in _SPECIAL[kind] if name]
  names += [f'<0x{byte:02X}>' for byte in range(256)]
  names += [token for token in learnt if token not in '√😀é']
  backend = tokenizers.Tokenizer(
    models.BPE(
      vocab={name: index for index, name in enumerate(dict.fromkeys(names))},
      merges=[m for m in merges if not set('√😀é') & set(''.join(m))],
      unk_token='<unk>',
      fuse_unk=True,
      byte_fallback=True,
    )
  )
  if kind == 'mistral':
    backend.pre_tokenizer = pre_tokenizers.Metaspace('▁', 'first', False)
  else:
    backend.normalizer = normalizers.Sequence(
      [normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')]
    )
  steps = [decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse()]
  backend.decoder = decoders.Sequence([*steps, decoders.Strip(' ', 1, 0)])
  return backend


@pytest.fixture(scope='package')
def tokenizer_dir(tmp_path_factory):
  """Writes a tokenizer directory as model repositories hold it.

  `kind` is a key of `_SPECIAL`; `template` the text of a chat template or a key
  of `TEMPLATES`; `edit` changes the JSON of tokenizer.json, and keywords are
  more entries of tokenizer_config.json.
  """

  def make(kind, template='chatml', *, edit=None, **config):
    directory = tmp_path_factory.mktemp(kind)
    is_level = kind in ('qwen3', 'llama3')
    backend = _byte_level(kind) if is_level else _byte_fallback(kind)
    bos, eos, pad, *others = _SPECIAL[kind]
    backend.add_special_tokens(
      [
        tokenizers.AddedToken(name, special=True, normalized=False)
        for name in (bos, eos, pad, *others)
        if name
      ]
    )
    if kind == 'qwen3':
      thinking = [tokenizers.AddedToken(f'<{s}think>') for s in ('', '/')]
      backend.add_tokens(thinking)
    else:
      backend.post_processor = processors.TemplateProcessing(
        single=f'{bos} $A', special_tokens=[(bos, backend.token_to_id(bos))]
      )
    description = json.loads(backend.to_str())
    if edit is not None:
      edit(description)
    config = {
      'tokenizer_class': 'PreTrainedTokenizerFast',
      'clean_up_tokenization_spaces': True,
      'chat_template': TEMPLATES.get(template, template),
      **{'bos_token': bos, 'eos_token': eos, 'pad_token': pad},
      **config,
    }
    (directory / 'tokenizer.json').write_text(json.dumps(description))
    (directory / 'tokenizer_config.json').write_text(json.dumps(config))
    return directory

  return make


@pytest.fixture(scope='package')
def make_chat(tokenizer_dir):
  """Makes the bridge of such a directory."""

  def make(kind, template='chatml', *, rendering='template', **changes):
    directory = tokenizer_dir(kind, template, **changes)
    loaded = chat_lib.load_tokenizer(directory)
    return chat_lib.Chat(loaded, rendering=rendering)

  return make
