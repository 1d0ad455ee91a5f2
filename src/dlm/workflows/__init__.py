"""Use cases: each takes a model or a name, does the work, reports progress, and returns a frozen result."""
