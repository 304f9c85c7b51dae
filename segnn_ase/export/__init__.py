"""A potential as a C library that stands alone, for programs in any language."""
