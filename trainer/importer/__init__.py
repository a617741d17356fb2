"""What the public scripts wrote, brought in: their names, their files, our folder."""
