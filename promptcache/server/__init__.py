"""An OpenAI-compatible server: mlx-lm's, with a prompt cache that survives."""
