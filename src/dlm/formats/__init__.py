"""Reading and writing checkpoints: our own directories, Hugging Face directories, GGUF files, and fetching them."""
