"""The language model: architecture, scoring, files and meshes. Knows no RL."""
