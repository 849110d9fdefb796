"""Device meshes, and the processes of one run."""
