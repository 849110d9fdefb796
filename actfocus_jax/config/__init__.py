"""The config: fields, validation, presets and resume rules."""
