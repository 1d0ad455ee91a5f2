"""Grids as data: their shape and cells, the groups that cells belong to, rules, symmetries and puzzles."""
