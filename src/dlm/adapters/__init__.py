"""What is trained for an autoregressive base and loaded beside it: gated LoRA, Medusa heads, and their training."""
