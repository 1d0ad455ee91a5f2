"""Use cases as functions: each takes models by name or as a `LanguageModel`, reports progress through a callback, and returns a frozen
dataclass whose `record()` is the JSON that the command prints with `--json`."""
