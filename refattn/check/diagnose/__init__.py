"""What failures have in common, in words; and the smallest call that still fails."""
