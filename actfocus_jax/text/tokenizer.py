"""Tokenizer of the built-in model, trained on the environments' own text.

The built-in model has no pretrained tokenizer, so one is trained: byte-level
BPE behind Qwen2's pre-tokenizer, with Qwen's chat markup. It is saved and
loaded like any Hugging Face tokenizer. Two things fit it to the built-in model:

- Phrases that an environment repeats ("Board size: ") become single tokens,
  which more than halves the length of a conversation.
- Digits and board cells stay single tokens, so that a board can be read.
"""

import collections
import functools
import json
import re
from collections.abc import Iterable

PAD, START, END = '<|endoftext|>', '<|im_start|>', '<|im_end|>'
_MARKUP = re.compile('|'.join(map(re.escape, (PAD, START, END))))

# ChatML, as Qwen2.5 writes it without tools.
CHAT_TEMPLATE = (
  '{% for message in messages %}'
  "{{ '<|im_start|>' + message.role + '\n' + message.content"
  " + '<|im_end|>\n' }}"
  '{% endfor %}'
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# The end of a phrase: a digit, a cell of a board, a tag, the separator of
# actions.
_CELL = r'[_#√]|[POGXS](?![a-z])'
_BREAK = re.compile(rf'(</?[a-z]+>|\d|{_CELL}| ?\|\| ?)')
# Phrases in fewer than this share of the documents are left to BPE.
_COMMON = 0.02


def train(texts: Iterable[str], *, vocab_size: int = 768):
  """Train the tokenizer: a Qwen2Tokenizer with template, eos and pad token.

  Args:
    texts: documents without chat markup, one per message.
    vocab_size: upper limit of the vocabulary without the phrases: 256 bytes,
      3 special tokens, merges. Merging stops earlier when no pair occurs twice.
  """
  import tokenizers
  import transformers

  documents = [_BREAK.split(text) for text in texts]
  pieces = [piece for document in documents for piece in document[::2]]
  vocab, merges = _train_bpe(pieces, vocab_size)
  tokenizer = transformers.Qwen2Tokenizer(
    vocab=vocab,
    merges=merges,
    unk_token=PAD,
    eos_token=END,
    pad_token=PAD,
    extra_special_tokens=[START],
  )
  added = functools.partial(
    tokenizers.AddedToken, normalized=False, special=False
  )
  tokenizer.add_tokens([added(phrase) for phrase in _phrases(documents)])
  tokenizer.chat_template = CHAT_TEMPLATE
  return tokenizer


def split_markup(text: str) -> list[str]:
  """Return the texts between the special tokens of a rendered conversation."""
  return [piece for piece in _MARKUP.split(text) if piece]


def _train_bpe(pieces: list[str], vocab_size: int):
  """Learn byte-pair merges behind Qwen2's pre-tokenizer: (vocab, merges)."""
  import tokenizers
  import transformers
  from tokenizers import models, pre_tokenizers, trainers

  bpe = tokenizers.Tokenizer(models.BPE())
  bpe.pre_tokenizer = (
    transformers.Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
  )
  bpe.train_from_iterator(
    pieces,
    trainers.BpeTrainer(
      vocab_size=vocab_size,
      min_frequency=2,
      special_tokens=[PAD, START, END],
      initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
      show_progress=False,
    ),
  )
  model = json.loads(bpe.to_str())['model']
  return model['vocab'], [tuple(pair) for pair in model['merges']]


def _phrases(documents: list[list[str]]) -> list[str]:
  """Return tags, the separator, and texts that often stand between breaks.

  Single words are left to BPE: as added tokens they would be cut out of
  longer words.
  """
  counts = collections.Counter()
  for document in documents:
    words = {piece for piece in document[::2] if not piece.strip().isalpha()}
    breaks = set(document[1::2])
    counts.update(words | breaks)
  least = max(2, _COMMON * len(documents))
  # A single byte is a token already; a cell such as √ is three bytes.
  common = [p for p, n in counts.items() if n >= least and len(p.encode()) > 1]
  return sorted(common)
