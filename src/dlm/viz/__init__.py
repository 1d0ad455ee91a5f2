"""Pictures of a run: the terminal, one HTML page, a GIF. Reads Trajectory only."""
