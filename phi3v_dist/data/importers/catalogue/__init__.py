"""The drawn product catalogue: `plan` (what is sold) → `drawing` and `words` (what is seen and said) → `..sample`."""
