"""What two or more systems share: text and image encoders, residual blocks."""
