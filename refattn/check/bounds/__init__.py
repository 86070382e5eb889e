"""What a right kernel may lose, and what its errors should look like: derived for every element."""
