"""What is written for people and programs: result files and the page."""
