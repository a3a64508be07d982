"""The commands, one file each: options in, rooms composed, one summary out."""
