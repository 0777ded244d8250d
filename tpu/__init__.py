"""TPU slices: scripts that create, use and delete them, and a planner that needs none."""
