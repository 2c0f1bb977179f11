"""The embedded default model, downloaded and converted once."""
