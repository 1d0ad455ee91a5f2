"""Decoders: each takes a Canvas and yields Frames; none knows a network beyond the Denoiser protocol."""
