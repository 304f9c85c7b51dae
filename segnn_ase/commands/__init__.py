"""Sub-commands of `segnn` in modules of their own, and what all of them share."""
