"""Model families, one file each: how to make a student from its teacher, and how to run both."""
