"""The wire format: OpenAI's protocol, native events, and the schema of requests."""
