"""Edits: what is made of a picture that is there already."""
