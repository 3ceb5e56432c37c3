"""The commands of `torchfilm`, one file each: options as a frozen dataclass, and what they do."""
