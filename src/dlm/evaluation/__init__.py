"""Numbers that can be believed: each with its estimator, sample count and standard error."""
