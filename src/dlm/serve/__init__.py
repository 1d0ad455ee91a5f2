"""The server: an engine that shares network calls among requests, the OpenAI protocol and native events on top of it."""
