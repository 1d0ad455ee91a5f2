"""The wire: OpenAI's protocol, native events, and what a request may say."""
