"""Forward processes and their bounds; torch only, no network and no tokenizer."""
