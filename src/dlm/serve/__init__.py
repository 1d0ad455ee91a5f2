"""The server: an engine that shares forward passes among requests, the OpenAI protocol and native events on top of it."""
