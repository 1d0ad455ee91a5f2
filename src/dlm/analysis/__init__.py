"""What a trajectory shows."""
