"""Models: a model in memory, what identifies it, and how it reads.

It loads models with mlx-lm, derives their fingerprint, and plans where the pieces of a
prefill end. What runs them is `engine`.
"""
