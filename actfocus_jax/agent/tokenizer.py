"""A byte-level BPE tokenizer trained on the environments' own text.

The small default model has no pretrained tokenizer to take, so it makes one
with Qwen's chat markup. It is saved as a Hugging Face directory and loaded
like any other (`chat.load_tokenizer`).
"""

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

# Pieces that merges may not cross. Digits and board cells stay single, so that
# a small model can read a board; the separator of actions stays apart, so that
# actions are tokens of their own; set phrases in between may become one token.
_CELL = r'[_#√]|[POGXS](?![a-z])'
_PATTERN = '|'.join(
  (
    r'</?\p{L}+>',  # a tag
    r'\p{N}',
    _CELL,
    r' ?\|\| ?',
    rf'(?:(?!{_CELL})[^\p{{N}}<|])+',  # a phrase, punctuation and all
    r'[<|]',
  )
)


def train(texts: Iterable[str], *, vocab_size: int = 768):
  """Trains the tokenizer.

  Args:
    texts: Documents without chat markup.
    vocab_size: Upper limit of the vocabulary, 256 bytes and 3 special tokens
      included. Merging stops earlier when no pair is left that occurs twice.

  Returns:
    A transformers tokenizer with chat template, eos `<|im_end|>` and pad
    `<|endoftext|>`.
  """
  import tokenizers
  import transformers
  from tokenizers import decoders, models, pre_tokenizers, trainers

  bpe = tokenizers.Tokenizer(models.BPE())
  bpe.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(tokenizers.Regex(_PATTERN), 'isolated'),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  bpe.decoder = decoders.ByteLevel()
  bpe.train_from_iterator(
    texts,
    trainers.BpeTrainer(
      vocab_size=vocab_size,
      min_frequency=2,
      special_tokens=[PAD, START, END],
      initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
      show_progress=False,
    ),
  )
  tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=bpe,
    eos_token=END,
    pad_token=PAD,
    extra_special_tokens=[START],
    clean_up_tokenization_spaces=False,
  )
  tokenizer.chat_template = CHAT_TEMPLATE
  return tokenizer


def split_markup(text: str) -> list[str]:
  """The texts between the special tokens of a rendered conversation."""
  return [piece for piece in _MARKUP.split(text) if piece]
