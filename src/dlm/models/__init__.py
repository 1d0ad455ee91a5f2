"""Networks, their caches and their files; they know no noise."""
