"""The `config.json` of diffusers' and transformers' networks as our configs, and back."""
