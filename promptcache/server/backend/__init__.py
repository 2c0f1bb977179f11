"""The backend: mlx-lm's server loop, with prompts that know their request."""
