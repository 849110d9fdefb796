"""The tokenizer bridge: chat templates, exact bytes, answer spans."""
