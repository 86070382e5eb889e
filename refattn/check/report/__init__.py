"""What a check found: as text, JSON, JUnit and a page."""
