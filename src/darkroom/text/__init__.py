"""Text to token ids to states: tokenizers and text encoders."""
