"""Files of tensors, whatever wrote them: bytes to named tensors and back."""
