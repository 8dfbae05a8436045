"""What is attached to a model from outside: pictures as prompts."""
